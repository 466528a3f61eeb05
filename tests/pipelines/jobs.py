"""What the tests of the main job share: the command line in a process of its own, small recipes, small data."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-c", "from pipelines.cli import main; main()")
# The least that is still the whole way: one runtime, FP32, one operating point, one second of measuring. PyTorch takes
# as long to open as everything else in the race together: it is timed where a test looks at it.
SMALL = (
    "targets=[onnxruntime-cpu]",
    "precisions=[fp32]",
    "threads=1",  # two threads that wait for each other starve where other tests run beside them
    "parity.samples=4",
    "latency.points=[1x8]",
    "latency.budget_s=1.0",
    "latency.min_block_ms=5.0",
    "latency.baselines=[]",
)
ENCODER = ("include_source=true", "latency.baselines=[eager]")
"""What the recipe of the bundle that tests share has beyond `SMALL`."""
TEXTS = (
    "The river is long.",
    "What a film!",
    "She asked a question about the mountain, and nobody knew the answer.",
    "We left the house before the music ended.",
    "Good.",
    "The old engine made a small sound, then a great one, then none at all.",
    "They thought that the city by the water was the best place in the world.",
    "A word may be enough.",
    "He never said why he took the second boat and not the first.",
    "It is only a model of a model.",
    "Look at these three lines and say which one is the longest, if you can.",
    "Years later the number was still the same.",
)


def settings(*overrides: str) -> list[str]:
    """``--set`` options of the smallest recipe, and `overrides`."""
    return [part for item in (*SMALL, *overrides) for part in ("--set", item)]


def environment(cache: Path, **more: str) -> dict[str, str]:
    """The environment of a process whose cache is `cache`, wherever it runs."""
    search = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
    return {**os.environ, "PYTHONPATH": search, "PLANISH_CACHE": str(cache), **more}


def planish(
    *arguments: str | Path, cache: Path, cwd: Path | None = None, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment(cache, **more),
        timeout=600,
        check=False,
    )


def export(
    source: str | Path, out: Path, cache: Path, *overrides: str, options: Sequence[str | Path] = ()
) -> subprocess.CompletedProcess[str]:
    """``planish export`` of `source` with the smallest recipe."""
    return planish("export", source, "--out", out, *settings(*overrides), *options, cache=cache)


def texts_file(path: Path, texts: Sequence[str] = TEXTS, labels: Sequence[str] | None = None) -> Path:
    """Evaluation data as JSON lines: role ``text``, and ``label`` where `labels` are given."""
    rows = [{"text": text} | ({} if labels is None else {"label": labels[i]}) for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def files_under(folder: Path, prefix: str = "") -> dict[str, Path]:
    """Every file below `folder` by its name in a bundle, as `write_bundle` takes them."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {prefix + path.relative_to(folder).as_posix(): path for path in paths}


def manifest(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / "planish.json").read_text(encoding="utf-8"))
    return found


def verdicts(bundle: Path) -> dict[str, Any]:
    """What a run decided about each variant: status, and the verdict of each gate."""
    return {
        entry["id"]: (entry["status"], {name: gate["verdict"] for name, gate in entry["gates"].items()})
        for entry in manifest(bundle)["variants"]
    }


def marked(marker: str) -> list[str]:
    """Living processes whose environment holds `marker`: their ids and command lines."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            if marker.encode() in (folder / "environ").read_bytes():
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.append(f"{folder.name}: {line[:200]}")
        except OSError:  # it ended meanwhile, or is a zombie
            continue
    return found


def none_left(marker: str, patience_s: float = 10.0) -> list[str]:
    """The processes that carry `marker` still after a while; normally none after a moment."""
    end = time.monotonic() + patience_s
    while (left := marked(marker)) and time.monotonic() < end:
        time.sleep(0.05)
    return left
