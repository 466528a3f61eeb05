"""Stages: calibration, and the int8 and int4 forms."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.artifact import Artifact
from pipelines.processes import report_progress
from pipelines.stages.data import open_data, open_encoder
from pipelines.stages.files import external_data

if TYPE_CHECKING:
    from calibration.datasets import Dataset

TABLE = "calibration.json"
BATCH_SIZE = 8
CHUNK_ROWS = 512
"""Rows that are encoded together: sorted by length within, so that padding stays short, and forgotten afterwards."""
INT8 = "model_int8.onnx"
FILES = {"int8": INT8, "int4": "model_int4.onnx"}
SMOOTHED = "model_smooth.onnx"
CHECKED_BATCHES = 4
PROGRAM = "model.pt2"


def calibrate(arguments: dict[str, Any]) -> dict[str, Any]:
    """Take ranges and histograms of the tensors that static forms quantize.

    Args:
        arguments: ``artifact`` (the FP32 graph), ``original``, ``data``, ``samples`` (rows at most), ``seed``,
            ``threads``, ``folder``.

    Returns:
        ``path`` of the table relative to the folder, and ``record``: rows and batches seen, where they are from, notes.
    """
    from calibration.collect import collect
    from calibration.quantize.products import observed
    from exporter.onnx_files import load_model

    artifact, folder = Artifact.from_dict(arguments["artifact"]), Path(arguments["folder"])
    rows = open_rows(arguments)
    tensors = observed(load_model(artifact.path))
    report_progress(f"observing {len(tensors)} tensors")
    table = collect(
        artifact.path,
        batches(arguments, rows),
        tensors,
        threads=int(arguments["threads"]),
        origin=rows.origin,
        digest=rows.digest,
    )
    table.save(folder / TABLE)
    record = {"samples": table.samples, "batches": table.batches, "origin": table.origin, "notes": list(table.notes)}
    return {"path": TABLE, "record": {**record, "tensors": len(tensors)}}


def smooth(arguments: dict[str, Any]) -> dict[str, Any]:
    """Move outliers of activations into weights, and prove that the graph still computes the same.

    Args:
        arguments: ``artifact`` (the FP32 graph), ``table`` of it, ``alpha`` (``None``: one per group of products),
            ``original``, ``data``, ``samples``, ``seed``, ``external_data``, ``folder``.

    Returns:
        ``path`` of the smoothed graph, null where nothing is worth smoothing; ``record``: what was done and left.
    """
    from calibration.smooth import smooth_file
    from calibration.table import load_table

    artifact, folder = Artifact.from_dict(arguments["artifact"]), Path(arguments["folder"])
    report_progress("smoothing")
    record = smooth_file(
        artifact.path,
        folder / SMOOTHED,
        load_table(Path(arguments["table"])),
        alpha=arguments["alpha"],
        samples=islice(batches(arguments, open_rows(arguments))(), CHECKED_BATCHES),
        external_data=external_data(arguments),
    )
    return {"path": SMOOTHED if record["groups"] else None, "record": record}


def static(arguments: dict[str, Any]) -> dict[str, Any]:
    """Put Q/DQ pairs around the products, in the form of one target.

    Args:
        arguments: ``artifact`` (the FP32 graph), ``table``, ``scheme`` (its name), ``method`` (or null), ``tables``
            (whether embedding tables may be int8), ``name`` (of the file), ``external_data``, ``folder``.
    """
    report_progress("quantizing")
    name = arguments["name"]
    record = write_static(arguments, Path(arguments["folder"]) / name)
    precision = "fp8" if record["scheme"]["activations"] == "fp8" else "int8"
    return {"path": name, "record": {"precision": precision, **record}}


def write_static(arguments: Mapping[str, Any], path: Path, keep: Collection[str] = ()) -> dict[str, Any]:
    """Write the form that `static` makes to `path`, but for the nodes to `keep` in FP32; returns its record."""
    from dataclasses import replace

    from calibration.quantize.qdq import SCHEMES, quantize_static
    from calibration.table import load_table

    artifact, scheme = Artifact.from_dict(arguments["artifact"]), SCHEMES[arguments["scheme"]]
    scheme = replace(scheme, tables=scheme.tables and arguments["tables"])
    if arguments["method"] is not None and scheme.activations != "fp8":
        scheme = replace(scheme, method=arguments["method"])
    table = load_table(Path(arguments["table"]))
    return quantize_static(artifact.path, path, table, scheme, keep=keep, external_data=external_data(arguments))


def dynamic(arguments: dict[str, Any]) -> dict[str, Any]:
    """Quantize the products with constant weights by the range of each batch.

    Args:
        arguments: ``artifact`` (an FP32 graph), ``tables`` (whether embedding tables may be int8), ``external_data``,
            ``folder``.
    """
    report_progress("quantizing")
    record = write_dynamic(arguments, Path(arguments["folder"]) / INT8)
    return {"path": INT8, "record": {"precision": "int8", **record}}


def write_dynamic(arguments: Mapping[str, Any], path: Path, keep: Collection[str] = ()) -> dict[str, Any]:
    """Write the form that `dynamic` makes to `path`, but for the nodes to `keep` in FP32; returns its record."""
    from calibration.quantize.dynamic import quantize_dynamic

    artifact = Artifact.from_dict(arguments["artifact"])
    how = {"tables": arguments["tables"], "external_data": external_data(arguments)}
    return quantize_dynamic(artifact.path, path, keep=keep, **how)


def weight_only(arguments: dict[str, Any]) -> dict[str, Any]:
    """Quantize the weights of products alone.

    Args:
        arguments: ``artifact`` (an FP32 graph), ``precision`` (``int8`` or ``int4``), ``external_data``, ``folder``.
    """
    report_progress("quantizing")
    precision = arguments["precision"]
    path = FILES[precision]
    record = write_weight_only(arguments, Path(arguments["folder"]) / path)
    return {"path": path, "record": {"precision": precision, **record}}


def write_weight_only(arguments: Mapping[str, Any], path: Path, keep: Collection[str] = ()) -> dict[str, Any]:
    """Write the form that `weight_only` makes to `path`, but for the nodes to `keep` in FP32; returns its record."""
    from calibration.quantize.weight_only import quantize_weight_only
    from exporter.targets.onnxruntime import WEIGHT_BITS

    artifact, bits = Artifact.from_dict(arguments["artifact"]), WEIGHT_BITS[arguments["precision"]]
    return quantize_weight_only(artifact.path, path, bits=bits, keep=keep, external_data=external_data(arguments))


def program(arguments: dict[str, Any]) -> dict[str, Any]:
    """Quantize a `torch.export` program.

    Args:
        arguments: ``artifact`` (the FP32 program), ``form``, ``alpha`` (of a smoothed form; as `smooth` has it),
            ``original``, ``data``, ``samples``, ``seed``, ``folder``.
    """
    from calibration.quantize.program import quantize_program

    artifact, folder = Artifact.from_dict(arguments["artifact"]), Path(arguments["folder"])
    form = arguments["form"]
    static = form != "dynamic"
    report_progress("calibrating" if static else "quantizing")
    samples = batches(arguments, open_rows(arguments)) if static else tuple
    record = quantize_program(artifact, folder / PROGRAM, form=form, samples=samples, alpha=arguments["alpha"])
    return {"path": PROGRAM, "record": {"precision": "int8", **record}}


def open_rows(arguments: Mapping[str, Any]) -> Dataset:
    """The calibration data."""
    artifact = Artifact.from_dict(arguments["artifact"])
    return open_data(arguments["data"], arguments["original"]["task"], artifact.signature, artifact.contract)


def batches(arguments: Mapping[str, Any], rows: Dataset) -> Callable[[], Iterator[dict[str, np.ndarray]]]:
    """The calibration batches, the same at every call: rows spread over the data's lengths and contents, by seed.

    Rows are read and encoded a few hundred at a time, so that memory does not grow with their number.
    """
    from calibration.sampling import calibration_subset
    from pipelines.verification.encode import encode_rows

    original, seed = arguments["original"], int(arguments["seed"])
    encoder = open_encoder(original, Artifact.from_dict(arguments["artifact"]).signature)
    chosen = set(calibration_subset(rows, int(arguments["samples"]), seed=seed))

    def encoded() -> Iterator[dict[str, np.ndarray]]:
        chunk: list[Any] = []
        for index, row in enumerate(rows):
            if index in chosen:
                chunk.append(row)
            if len(chunk) == CHUNK_ROWS:
                yield from _encode(chunk)
                chunk = []
        if chunk:
            yield from _encode(chunk)

    def _encode(chunk: list[Any]) -> Iterator[dict[str, np.ndarray]]:
        for batch in encode_rows(original["task"], encoder, chunk, batch_size=BATCH_SIZE, seed=seed):
            yield batch.inputs

    return encoded
