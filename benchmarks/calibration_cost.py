"""What calibration costs: peak memory by number of samples, and time beside the plain forward pass.

    python benchmarks/calibration_cost.py BUNDLE [--length 128] [--samples 64 4096] [--peer-samples 16 64 128]

Each measurement runs in a process of its own over the bundle's FP32 graph and random token ids (batches of 8), so that
its peak resident memory is its own. Beside it ``onnxruntime.quantization``'s entropy calibrator over the same tensors
and batches. Times are of the passes alone, without opening sessions; forward, range and histogram pass take turns. The
table goes to the screen and to ``benchmarks/results/calibration-<date>.md``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BATCH = 8
ROUNDS = 5
TIMED_BATCHES = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--length", type=int, default=128, help="tokens of every sample")
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 4096])
    parser.add_argument("--peer-samples", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--threads", type=int, default=0, help="0: all that this process may use")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.job is not None:
        print(json.dumps(JOBS[asked.job[0]](asked, int(asked.job[1]))))
        return 0
    text = report(asked)
    print(text)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"calibration-{datetime.date.today()}.md"
    path.write_text(text, encoding="utf-8")
    print(f"written: {path}", file=sys.stderr)
    return 0


def report(asked: argparse.Namespace) -> str:
    from importlib.metadata import version

    from exporter.hardware import cpu_model

    times = run("times", 0)
    lines = [
        f"# What calibration costs: {asked.bundle.name}, {BATCH}x{asked.length}",
        "",
        f"{datetime.date.today()}; {cpu_model()}, {threads(asked)} threads; onnxruntime {version('onnxruntime')}.",
        "Peak resident memory of a process of its own, the libraries included (1 MB = 10^6 bytes).",
        "",
        "| calibrator | samples | peak memory | over ours with the fewest |",
        "| --- | ---: | ---: | ---: |",
    ]
    ours = {count: run("ours", count)["peak"] for count in asked.samples}
    least = ours[min(ours)]
    lines += [f"| Planish | {n:,} | {peak / 1e6:,.0f} MB | {peak / least:.2f}x |" for n, peak in ours.items()]
    for count in asked.peer_samples:
        peak = run("peer", count)["peak"]
        lines.append(f"| onnxruntime.quantization, entropy | {count:,} | {peak / 1e6:,.0f} MB | {peak / least:.2f}x |")
    lines += [
        "",
        f"Medians of {ROUNDS} rounds over {TIMED_BATCHES} batches, {times['tensors']} tensors observed:",
        "",
        "| pass | seconds | over the forward pass |",
        "| --- | ---: | ---: |",
    ]
    forward = times["forward"]
    lines += [
        f"| {name} | {times[name]:.2f} | {times[name] / forward:.2f}x |" for name in ("forward", "ranges", "histograms")
    ]
    return "\n".join(lines) + "\n"


def run(job: str, count: int) -> dict[str, Any]:
    """One measurement in a process of its own."""
    print(f"{job} {count or ''}".rstrip(), file=sys.stderr)
    command = [sys.executable, __file__, *sys.argv[1:], "--job", job, str(count)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def threads(asked: argparse.Namespace) -> int:
    from pipelines.recipe import usable_cores

    return asked.threads or usable_cores()


def batches(asked: argparse.Namespace, samples: int) -> Iterator[dict[str, np.ndarray]]:
    """Random token ids, made anew at every call and the same each time."""
    from pipelines.bundle import read_bundle

    contract = read_bundle(asked.bundle).manifest.input_contract
    draw = np.random.default_rng(0)
    for start in range(0, samples, BATCH):
        shape = (min(BATCH, samples - start), asked.length)
        ranges = {name: tuple(span) for name, span in contract.id_ranges.items()}
        made = {name: draw.integers(low, high + 1, shape) for name, (low, high) in ranges.items()}
        if contract.mask is not None:
            made[contract.mask] = np.ones(shape, np.int64)
        yield made


def graph_of(asked: argparse.Namespace) -> tuple[Path, list[str]]:
    """The FP32 graph, and the tensors that static forms quantize."""
    from calibration.quantize.products import observed
    from exporter.onnx_files import load_model

    path = asked.bundle / "onnx" / "model.onnx"
    return path, observed(load_model(path))


def ours(asked: argparse.Namespace, samples: int) -> dict[str, Any]:
    from calibration.collect import collect
    from pipelines.processes.inside import peak_rss_bytes

    path, tensors = graph_of(asked)
    collect(path, lambda: batches(asked, samples), tensors, threads=threads(asked))
    return {"peak": peak_rss_bytes()}


def peer(asked: argparse.Namespace, samples: int) -> dict[str, Any]:
    from onnxruntime.quantization.calibrate import CalibrationDataReader, CalibrationMethod, create_calibrator

    from pipelines.processes.inside import peak_rss_bytes

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = batches(asked, samples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    path, _ = graph_of(asked)
    with tempfile.TemporaryDirectory() as folder:
        calibrator = create_calibrator(
            path,
            ["MatMul", "Gemm"],
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=CalibrationMethod.Entropy,
        )
        calibrator.collect_data(Reader())
        calibrator.compute_data()
    return {"peak": peak_rss_bytes()}


def times(asked: argparse.Namespace, _: int) -> dict[str, Any]:
    from calibration.collect import Ranges, collect_histograms, collect_ranges
    from exporter.targets.onnxruntime import open_cpu_session

    path, tensors = graph_of(asked)
    count = threads(asked)
    given = list(batches(asked, TIMED_BATCHES * BATCH))
    session = open_cpu_session(path, count)
    ranges: Ranges = collect_ranges(path, given, tensors, threads=count)

    def forward() -> None:
        for batch in given:
            session.run(None, batch)

    def opening(work: Callable[[list[dict[str, np.ndarray]]], object]) -> float:
        """Seconds of the batches alone: of all of them, less what one pass over the first costs, scaled up."""
        start = time.perf_counter()
        work(given)
        whole = time.perf_counter() - start
        start = time.perf_counter()
        work(given[:1])
        one = time.perf_counter() - start
        return (whole - one) * len(given) / (len(given) - 1)

    found: dict[str, list[float]] = {"forward": [], "ranges": [], "histograms": []}
    for _round in range(ROUNDS):
        start = time.perf_counter()
        forward()
        found["forward"].append(time.perf_counter() - start)
        found["ranges"].append(opening(lambda some: collect_ranges(path, some, tensors, threads=count)))
        found["histograms"].append(opening(lambda some: collect_histograms(path, some, ranges, threads=count)))
    return {"tensors": len(tensors), **{name: float(np.median(values)) for name, values in found.items()}}


JOBS: dict[str, Callable[[argparse.Namespace, int], dict[str, Any]]] = {"ours": ours, "peer": peer, "times": times}

if __name__ == "__main__":
    sys.exit(main())
