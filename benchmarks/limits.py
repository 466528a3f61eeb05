"""How near a bundle's variants come to what the processor can do at most.

    python benchmarks/limits.py BUNDLE [--variants ID ...]

The limit is measured here: dot products of registers alone (AVX-512: FP32 fused multiply-add, BF16 and int8 dot
products), one thread for each core, without any memory. The work is counted in the bundle's FP32 graph: multiplications
and additions of its matrix products at each operating point. The durations are those of the bundle's own evidence, so
that the machine has to be the one that made it, and idle. The table goes to the screen and to
``benchmarks/results/limits-<date>.md``.

Only for x86 processors with AVX-512 VNNI and BF16, and where ``g++`` is.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
REGISTERS = 12
"""Independent sums at a time: more than a unit's latency times its width."""
REPEATS, RUNS = 30_000_000, 8
KERNELS = {"fp32": ("vfmadd231ps", 32), "bf16": ("vdpbf16ps", 64), "int8": ("vpdpbusd", 128)}
"""By precision the instruction, and the operations of one on a register of 512 bits."""
PRODUCTS = {"MatMul", "Gemm"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--variants", nargs="+", help="default: those that were selected, and the best of each precision"
    )
    parser.add_argument("--threads", type=int, default=0, help="0: all that this process may use")
    asked = parser.parse_args()
    text = report(asked)
    print(text)
    path = RESULTS / f"limits-{datetime.date.today()}.md"
    path.write_text(text, encoding="utf-8")
    print(f"written: {path}", file=sys.stderr)
    return 0


def report(asked: argparse.Namespace) -> str:
    from exporter.hardware import affinity, cpu_features, cpu_model
    from pipelines.bundle import read_bundle

    bundle = read_bundle(asked.bundle)
    threads = asked.threads or len(affinity())
    lacking = {"avx512_vnni", "avx512_bf16"} - set(cpu_features())
    if lacking:
        raise SystemExit(f"this processor has no {', '.join(sorted(lacking))}: its limit is not measured here")
    limits = measured_limits(threads)
    timings = json.loads((bundle.path / "evidence" / "latency.json").read_text(encoding="utf-8"))
    work = {point: operations(bundle.path / "onnx" / "model.onnx", bundle, point) for point in bundle.points}
    told = ", ".join(f"{name} {limit:,.0f}" for name, limit in limits.items())
    lines = [
        f"# Share of the processor's limit: {bundle.manifest.name}",
        "",
        f"{datetime.date.today()}; {cpu_model()}, {threads} threads. Limits, 10^9 operations a second: {told}.",
        "Work: multiplications and additions of the matrix products alone. At the limit: what they would take in the",
        "variant's precision, if nothing else took any time. Of an INT8 variant the products between activations",
        "(attention) are counted at the limit of BF16 where its form says so, else at that of FP32.",
        "",
        "| point | variant | work, 10^9 | at the limit, ms | p50, ms | share of the limit |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for point in bundle.points:
        for name in asked.variants or chosen(bundle, timings):
            p50 = timings["variants"][name]["points"][point]["p50_ms"]
            floor = at_limit(bundle.variant(name), work[point], limits)
            total = sum(work[point].values()) / 1e9
            lines.append(f"| {point} | {name} | {total:.2f} | {floor:.2f} | {p50:.2f} | {floor / p50:.0%} |")
    return "\n".join(lines) + "\n"


def chosen(bundle: Any, timings: dict[str, Any]) -> list[str]:
    """The fastest variant of each precision that passed and was timed, by the sum of its durations."""

    def total(name: str) -> float:
        return sum(point["p50_ms"] for point in timings["variants"][name]["points"].values())

    best: dict[str, str] = {}
    for entry in bundle.manifest.variants:
        timed = entry.status == "passed" and timings["variants"].get(entry.id, {}).get("points")
        if timed and (entry.precision not in best or total(entry.id) < total(best[entry.precision])):
            best[entry.precision] = entry.id
    return [best[precision] for precision in KERNELS if precision in best]


def at_limit(entry: Any, work: dict[str, float], limits: dict[str, float]) -> float:
    """Milliseconds that the products take at the limit."""
    between = entry.precision
    if entry.precision == "int8":
        between = "bf16" if "bf16" in str(entry.form).split("-") else "fp32"
    return (work["weights"] / limits[entry.precision] + work["activations"] / limits[between]) / 1e6


def operations(model: Path, bundle: Any, point: str) -> dict[str, float]:
    """Multiplications and additions of products with weights, and of those between activations, at a point."""
    import numpy as np
    import onnx
    import onnxruntime
    from safetensors.numpy import load_file

    loaded = onnx.load(model)
    graph = loaded.graph
    constants = {tensor.name for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type in PRODUCTS]
    shown = {name for node in products for name in (*node.input[:2], *node.output) if name not in constants}
    known = {value.name for value in graph.output}
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(shown - known))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shown.onnx"
        onnx.save(loaded, path)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        inputs = load_file(bundle.path / "evidence" / "golden" / "points" / f"{point}.safetensors")
        names = [output.name for output in session.get_outputs()]
        shapes = {name: np.shape(array) for name, array in zip(names, session.run(None, inputs), strict=True)}
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    found = {"weights": 0.0, "activations": 0.0}
    for node in products:
        transposed = node.op_type == "Gemm" and any(a.name == "transA" and a.i for a in node.attribute)
        inner = shapes[node.input[0]][0 if transposed else -1]
        kind = "weights" if node.input[1] in constants else "activations"
        found[kind] += 2.0 * inner * float(np.prod(shapes[node.output[0]]))
    return found


def measured_limits(threads: int) -> dict[str, float]:
    """10^9 operations a second of each kernel, over all threads: the best of some runs."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "limits.cpp", Path(folder) / "limits"
        source.write_text(code(), encoding="utf-8")
        subprocess.run(["g++", "-O2", "-march=native", "-pthread", str(source), "-o", str(program)], check=True)
        runs = []
        for _ in range(RUNS):
            done = subprocess.run([str(program), str(threads)], check=True, capture_output=True, text=True)
            runs.append({name: float(value) for name, value in map(str.split, done.stdout.splitlines())})
    return {name: max(run[name] for run in runs) for name in KERNELS}


def code() -> str:
    """A C++ program that prints what each kernel reaches."""
    clobbered = ", ".join(f'"zmm{i}"' for i in [*range(REGISTERS), 30, 31])
    parts = []
    for name, (instruction, each) in KERNELS.items():
        body = "".join(f'"{instruction} %%zmm30, %%zmm31, %%zmm{i}\\n"' for i in range(REGISTERS))
        clear = "".join(f'"vpxorq %%zmm{i}, %%zmm{i}, %%zmm{i}\\n"' for i in [*range(REGISTERS), 30, 31])
        parts.append(
            f'run("{name}", {each * REGISTERS}.0, threads, [] {{ asm volatile({clear} ::: {clobbered});\n'
            f"for (long i = 0; i < {REPEATS}L; i++) asm volatile({body} ::: {clobbered}); }});"
        )
    return f"""
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>
template <class Work> void run(const char* name, double each, int threads, Work work) {{
  auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> all;
  for (int i = 0; i < threads; i++) all.emplace_back(work);
  for (auto& thread : all) thread.join();
  double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf("%s %f\\n", name, threads * each * {REPEATS}L / seconds / 1e9);
}}
int main(int, char** arguments) {{
  int threads = std::atoi(arguments[1]);
  {chr(10).join(parts)}
}}
"""


if __name__ == "__main__":
    sys.exit(main())
