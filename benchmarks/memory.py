"""Peak memory of the whole process tree while a large model is exported and verified.

    python benchmarks/memory.py [--parameters 1.3] [--source FOLDER] [-- OPTIONS OF planish export]

Without a source a BERT with that many billions of random FP32 parameters is made in a temporary folder. Every 50 ms the
memory of ``planish export`` and of everything below it is added up, in two ways: RSS counts a page that two processes
share (the mapped weights of a file) twice, PSS counts it once. The table says by stage what the peak was, as a multiple
of the weights; it goes to the screen and to ``benchmarks/results/memory-<date>.md``.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
INTERVAL_S = 0.05
# Per layer a BERT of width h and 4h in its feed-forward part has 12 h^2 parameters, and h for every word piece.
WIDTH = 2048
WORD_PIECES = 30522
STEP = re.compile(r"^\[\d\d:\d\d\] (?P<title>.*) …$")


@dataclass
class Peak:
    """The most memory seen in a stage: bytes, and what each process had at that moment."""

    rss: int = 0
    pss: int = 0
    at_rss: list[tuple[str, int]] = field(default_factory=list)


class Watcher(threading.Thread):
    """Adds up the memory of a process and its descendants until it ends."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.stage = "start"
        self.peaks: dict[str, Peak] = {}
        self.ended = threading.Event()

    def run(self) -> None:
        import psutil

        root = psutil.Process(self.pid)
        while not self.ended.is_set():
            rss = pss = 0
            parts = []
            try:
                family = [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for process in family:
                try:
                    own = process.memory_info().rss
                    rss += own
                    pss += _proportional(process.pid)
                    parts.append((_called(process), own))
                except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
                    continue
            peak = self.peaks.setdefault(self.stage, Peak())
            peak.pss = max(peak.pss, pss)
            if rss > peak.rss:
                peak.rss, peak.at_rss = rss, parts
            self.ended.wait(INTERVAL_S)


def _proportional(pid: int) -> int:
    """The PSS of a process in bytes, as the kernel adds it up."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def _called(process: object) -> str:
    """What runs in a job: its function is not in its command line, so the last words of that have to do."""
    import psutil

    assert isinstance(process, psutil.Process)
    return " ".join(process.cmdline()[-3:])[-60:]


def make_source(folder: Path, billions: float) -> Path:
    """Write a BERT with about that many billions of random FP32 parameters."""
    sys.path.insert(0, str(ROOT))
    from tests.models import make_model

    layers = max(1, round((billions * 1e9 - WIDTH * WORD_PIECES) / (12 * WIDTH**2)))
    changes = {
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": WIDTH // 64,
        "intermediate_size": 4 * WIDTH,
    }
    return make_model("bert", folder, size="base", changes=changes)


def export(source: Path, out: Path, cache: Path, options: list[str]) -> tuple[int, Watcher, float]:
    """Run ``planish export`` and watch it; exit status, what was seen, seconds."""
    command = [sys.executable, "-c", "from pipelines.cli import main; main()", "export", str(source), "--out", str(out)]
    started = time.monotonic()
    process = subprocess.Popen(
        [*command, *options],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PLANISH_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
    )
    watcher = Watcher(process.pid)
    watcher.start()
    assert process.stderr is not None
    for line in process.stderr:
        print(line, end="", file=sys.stderr, flush=True)
        if found := STEP.match(line):
            watcher.stage = found["title"]
    status = process.wait()
    watcher.ended.set()
    watcher.join()
    return status, watcher, time.monotonic() - started


def render(watcher: Watcher, weights: int, status: int, seconds: float, name: str) -> str:
    """The table, as Markdown."""
    whole = Peak(max(peak.rss for peak in watcher.peaks.values()), max(peak.pss for peak in watcher.peaks.values()))
    rows = []
    for stage, peak in {**watcher.peaks, "**the whole run**": whole}.items():
        cells = [f"{found / unit:.2f}" for found in (peak.rss, peak.pss) for unit in (1e9, weights)]
        rows.append(f"| {' | '.join([stage, *cells])} |")
    lines = [
        f"# Peak memory of exporting {name}",
        "",
        f"{datetime.date.today().isoformat()}; weights {weights / 1e9:.2f} GB (1 GB = 10^9 bytes); exit",
        f"status {status} after {seconds / 60:.1f} minutes. Sums over the whole process tree, taken",
        f"every {INTERVAL_S * 1000:.0f} ms or as often as the kernel's bookkeeping allows. RSS",
        "counts pages that processes share (mapped files) once for each of them, PSS once in all.",
        "",
        "| stage | RSS, GB | RSS / weights | PSS, GB | PSS / weights |",
        "| --- | ---: | ---: | ---: | ---: |",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="a model folder (default: make one)")
    parser.add_argument("--parameters", type=float, default=1.3, metavar="BILLIONS")
    parser.add_argument("--scratch", type=Path, help="where the model, the cache and the bundle go while it runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the table goes")
    parser.add_argument("options", nargs="*", help="options of planish export, after --")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="planish-memory-", dir=given.scratch) as scratch:
        folder = Path(scratch)
        source = given.source or make_source(folder / "model", given.parameters)
        weights = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        status, watcher, seconds = export(source, folder / "bundle", folder / "cache", given.options)
    text = render(watcher, weights, status, seconds, source.name)
    print(text)
    for stage, peak in watcher.peaks.items():
        parts = ", ".join(f"{name} {own / 1e9:.2f}" for name, own in peak.at_rss if own > weights / 20)
        print(f"{stage}: {parts}", file=sys.stderr)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / f"memory-{datetime.date.today().isoformat()}.md").write_text(text, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
