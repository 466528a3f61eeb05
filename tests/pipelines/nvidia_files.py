"""The files that TensorRT takes, made in this process by the functions that the main job calls, and what is in them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import onnx

from exporter.artifact import Artifact
from exporter.targets.tensorrt_builder import profiles_of
from pipelines.preflight import GPUS, Preflight, build_file

NAMES = {"fp32": "Float", "fp16": "Half", "bf16": "BFloat16", "int8": "Int8", "fp8": "FP8"}
"""By precision, TensorRT's name of the type that products multiply."""
TYPES = {
    onnx.TensorProto.FLOAT: "Float",
    onnx.TensorProto.FLOAT16: "Half",
    onnx.TensorProto.BFLOAT16: "BFloat16",
    onnx.TensorProto.INT8: "Int8",
    onnx.TensorProto.FLOAT8E4M3FN: "FP8",
}
PRODUCTS = ("MatMul", "Gemm", "Conv")
ROWS = 16


@dataclass
class Files:
    """One model in several precisions.

    Attributes:
        exported: The graph as it was exported: its signature is that of all.
        paths: The file of each precision.
        kept: By precision, the nodes that its record says stay in FP32.
    """

    exported: Artifact
    paths: dict[str, Path] = field(default_factory=dict)
    kept: dict[str, set[str]] = field(default_factory=dict)


def make_files(spec: str, folder: Path, precisions: Sequence[str] = tuple(NAMES), rows: int = ROWS) -> Files:
    """Export a source and lower it, with the built-in data of its task.

    Args:
        spec: The source.
        folder: Where the files go.
        precisions: Of `NAMES`; INT8 is smoothed.
        rows: Of data, to learn ranges from.
    """
    from calibration.collect import collect
    from calibration.half_ranges import collect_half_ranges
    from calibration.quantize.products import observed
    from calibration.quantize.qdq import SCHEMES, quantize_static
    from calibration.smooth import smooth_file
    from exporter.onnx_export import export_onnx
    from exporter.onnx_files import load_model
    from exporter.original import open_original
    from exporter.passes import optimize
    from exporter.precision.half import convert
    from exporter.sources import resolve_source
    from exporter.tasks import infer_task
    from pipelines.stages.quantize import batches, open_rows

    source = resolve_source(spec)
    task = infer_task(source)
    raw = export_onnx(open_original(source, task), folder / "raw")
    data = {"path": None, "columns": {}, "limit": None, "split": None, "seed": 0}
    original = {"source": source.to_dict(), "task": task.name}
    asked = {"artifact": raw.to_dict(), "original": original, "data": data, "samples": rows, "seed": 0}
    samples = list(batches(asked, open_rows(asked))())
    made = Files(raw)

    def place(precision: str, record: dict[str, Any] | None) -> None:
        made.paths[precision] = folder / f"model_{precision}.onnx"
        made.kept[precision] = {entry["node"] for entry in record["kept"]} if record else set()

    fp32 = folder / "model_fp32.onnx"
    optimize(raw.path, fp32, contract=raw.contract, samples=samples[:1])
    place("fp32", None)
    halves = [name for name in ("fp16", "bf16") if name in precisions]
    ranges = collect_half_ranges(fp32, samples).ranges if halves else {}
    for name in halves:
        out = folder / f"model_{name}.onnx"
        place(name, convert(fp32, out, precision=name, contract=raw.contract, ranges=ranges))  # type: ignore[arg-type]
    if {"int8", "fp8"} & set(precisions):
        table = collect(fp32, lambda: iter(samples), observed(load_model(fp32)))
        if "fp8" in precisions:
            place("fp8", quantize_static(fp32, folder / "model_fp8.onnx", table, SCHEMES["tensorrt-fp8"]))
        if "int8" in precisions:
            smooth = folder / "smooth.onnx"
            base = smooth if smooth_file(fp32, smooth, table, samples=iter(samples[:1]))["groups"] else fp32
            if base == smooth:
                table = collect(base, lambda: iter(samples), observed(load_model(base)))
            place("int8", quantize_static(base, folder / "model_int8.onnx", table, SCHEMES["tensorrt"]))
    return made


def build_files(made: Files, folder: Path, gpus: Sequence[str] = GPUS) -> dict[tuple[str, str], Preflight]:
    """Build every file for every GPU, as many at a time as there are processors."""
    profiles = profiles_of(made.exported.signature)

    def build(asked: tuple[str, str]) -> Preflight:
        precision, gpu = asked
        place = folder / f"{precision}-{gpu}"
        place.mkdir(parents=True)
        path = made.paths[precision]
        return build_file([path], gpu, profiles, place, variant=precision, name=path.name)

    asked = list(product(made.paths, gpus))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return dict(zip(asked, pool.map(build, asked), strict=True))


def products_in(path: Path) -> dict[str, str]:
    """By the name of each product in a file, the type that it multiplies: behind a Q/DQ pair its integers."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    graph = model.graph
    makers = {output: node for node in graph.node for output in node.output}
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    kinds |= {
        value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)
    }
    found = {}
    for node in graph.node:
        if node.op_type in PRODUCTS:
            read = node.input[0]
            if read in makers and makers[read].op_type == "DequantizeLinear":
                read = makers[read].input[0]
            found[node.name] = TYPES[kinds[read]]
    return found


def table(built: dict[tuple[str, str], Preflight]) -> list[str]:
    """What became of each file, a line each: whether it builds, size, seconds, layers, products by type."""
    return [
        f"{precision} {gpu}: {one.bytes} bytes, {one.seconds:.2f} s, {sum(one.layers.values())} layers, "
        f"{dict(Counter(one.products))}"
        if one.ok
        else f"{precision} {gpu}: {one.reason}"
        for (precision, gpu), one in built.items()
    ]
