"""Magnitudes of every float tensor of a graph over data: what decides which nodes of a half form stay in FP32.

Everything is reduced inside the graph to a few numbers a tensor, as soon as that tensor is there: no activation
outlives its readers, so that memory grows neither with the number of samples nor with that of tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.observing import observed_session, run_batch
from exporter.errors import RequestError
from exporter.precision.ranges import FP16_FLUSHED, FP16_SMALLEST_NORMAL, Range

if TYPE_CHECKING:
    import onnx_ir as ir
    import onnxruntime

Array = np.ndarray

SCHEMA_VERSION = 1

_COUNTS = ("nonzero", "subnormal", "flushed", "small")
_KINDS = ("min", "max", "sum", *_COUNTS)
_SAME_VALUES = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators whose result has the values of their input: measured once."""


@dataclass(frozen=True)
class HalfRanges:
    """What was seen of the tensors of an FP32 graph.

    Attributes:
        ranges: By name of the tensor.
        samples: Rows seen.
        batches: Batches seen.
        notes: Sentences for the record: tensors inside the model that were NaN or infinite.
    """

    ranges: Mapping[str, Range]
    samples: int
    batches: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "schema_version": SCHEMA_VERSION,
            "samples": self.samples,
            "batches": self.batches,
            "notes": list(self.notes),
            "ranges": {name: found.to_dict() for name, found in self.ranges.items()},
        }

    def save(self, path: Path) -> None:
        """Write it as JSON; equal ranges give equal bytes."""
        path.write_text(json.dumps(self.to_dict(), sort_keys=True) + "\n", encoding="utf-8")


def load_half_ranges(path: Path) -> HalfRanges:
    """Read what `HalfRanges.save` wrote.

    Raises:
        RequestError: The file is missing, damaged or of another version.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema_version"] != SCHEMA_VERSION:
            raise RequestError("the measured ranges are of another version", data["schema_version"], "Measure again")
        ranges = {name: Range.from_dict(entry) for name, entry in data["ranges"].items()}
        return HalfRanges(ranges, int(data["samples"]), int(data["batches"]), tuple(data["notes"]))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise RequestError("the measured ranges cannot be read", path, "Measure again") from error


@dataclass
class _Seen:
    """One tensor so far."""

    low: float = float("inf")
    high: float = float("-inf")
    shape: tuple[int, ...] | None = None
    nonzero: float = 0.0
    subnormal: float = 0.0
    flushed: float = 0.0
    small: float = 0.0
    sum: float = 0.0

    def grow(self, shape: Array) -> None:
        """Take in the shape that a batch had."""
        sizes = tuple(int(size) for size in shape)
        known = self.shape if self.shape is not None and len(self.shape) == len(sizes) else sizes
        self.shape = tuple(max(a, b) for a, b in zip(known, sizes, strict=True))

    def add(self, found: Mapping[str, Array], name: str) -> bool:
        """Take in the reductions of a batch; returns whether all values were finite."""
        if 0 in found[f"{name}|shape"]:
            return True
        low, high, total = (float(found[f"{name}|{kind}"]) for kind in ("min", "max", "sum"))
        if np.isnan(total):  # a maximum may pass over a NaN, a sum takes it up
            low = high = float("nan")
        # Python's min and max keep a NaN only where it comes first.
        self.low = self.low if np.isnan(self.low) else (low if np.isnan(low) else min(self.low, low))
        self.high = self.high if np.isnan(self.high) else (high if np.isnan(high) else max(self.high, high))
        if np.isfinite(total):
            for kind in ("sum", *_COUNTS):
                setattr(self, kind, getattr(self, kind) + float(found[f"{name}|{kind}"]))
        return bool(np.isfinite(low) and np.isfinite(high))

    def range(self) -> Range:
        if self.low == float("inf") and self.high == float("-inf"):  # always empty
            return Range(0.0, 0.0, shape=self.shape)
        share = 1.0 / max(self.nonzero, 1.0)
        weight = self.small / self.sum if self.sum > 0 else 0.0
        return Range(self.low, self.high, self.subnormal * share, self.flushed * share, weight, self.shape)


def collect_half_ranges(model: Path, samples: Iterable[Mapping[str, Array]], *, threads: int = 1) -> HalfRanges:
    """Run the batches through an FP32 graph and measure every float tensor of it (not those inside control flow).

    Args:
        model: The FP32 ONNX graph.
        samples: The batches.
        threads: Of ONNX Runtime.

    Raises:
        RequestError: There are no samples, or an output of the model is NaN or infinite: names the first such tensor
            and the sample. (A tensor inside may be: a softmax of a row that attends to nothing, or a mask of -inf.)
    """
    from exporter.onnx_files import load_model

    graph = load_model(model)
    outputs = {str(value.name) for value in graph.graph.outputs}
    sources = _observe_all(graph)
    names = list(dict.fromkeys(sources.values()))
    seen = {name: _Seen() for name in sources}
    rows = batches = 0
    strange: dict[str, int] = {}
    with observed_session(graph, threads) as session:
        for batch in samples:
            found = run_batch(session, batch)
            for name, part in seen.items():
                part.grow(found[f"{name}|shape"])
            bad = [name for name in names if not seen[name].add(found, name)]
            if any(sources.get(name) in bad for name in outputs):
                raise _not_finite(bad[0], rows + _first_bad_row(session, batch, bad[0]))
            for name in bad:
                strange.setdefault(name, rows)
            rows, batches = rows + len(next(iter(batch.values()))), batches + 1
    if not batches:
        raise RequestError("there are no calibration samples", None, "Give data with at least one row")
    ranges = {name: replace(seen[source].range(), shape=seen[name].shape) for name, source in sources.items()}
    notes = [f"{name} was NaN or infinite, first in the batch of sample {row}" for name, row in strange.items()]
    return HalfRanges(ranges, rows, batches, tuple(notes))


def _observe_all(graph: ir.Model) -> dict[str, str]:
    """Replace the graph's outputs by the shapes of all its float tensors and reductions of those that are not another
    one's values; returns, in graph order, for each the one that has its values (mostly itself)."""
    import onnx_ir as ir

    from exporter.passes.graphs import add_constant, infer_missing
    from exporter.precision.schemas import is_float

    infer_missing(graph)
    made = [value for node in graph.graph for value in node.outputs if value.name]
    values = [value for value in (*graph.graph.inputs, *made) if is_float(value)]
    zero, normal, gone = (
        add_constant(graph.graph, np.asarray(limit, np.float32), "measured_limit")
        for limit in (0.0, FP16_SMALLEST_NORMAL, np.nextafter(np.float32(FP16_FLUSHED), np.float32(1)))
    )
    graph.graph.outputs.clear()

    def add(op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes=attributes)
        graph.graph.append(node)
        return node.outputs[0]

    def output(name: str, value: ir.Value, dtype: ir.DataType = ir.DataType.FLOAT, rank: int = 0) -> None:
        value.name, value.dtype, value.shape = name, dtype, ir.Shape([None] * rank)
        graph.graph.outputs.append(value)

    def count(of: ir.Value) -> ir.Value:
        return add("ReduceSum", add("Cast", of, to=int(ir.DataType.FLOAT)), keepdims=0)

    sources: dict[str, str] = {}
    for value in values:
        name, node = str(value.name), value.producer()
        source = node.inputs[0] if node is not None and node.op_type in _SAME_VALUES and node.domain == "" else None
        sources[name] = sources.get(str(source.name), name) if source is not None else name
        output(f"{name}|shape", add("Shape", value), ir.DataType.INT64, 1)
        if sources[name] != name:
            continue
        size = add("Abs", value)
        nonzero, small, flushed = add("Greater", size, zero), add("Less", size, normal), add("Less", size, gone)
        output(f"{name}|min", add("ReduceMin", value, keepdims=0))
        output(f"{name}|max", add("ReduceMax", value, keepdims=0))
        output(f"{name}|sum", add("ReduceSum", size, keepdims=0))
        output(f"{name}|nonzero", count(nonzero))
        output(f"{name}|subnormal", count(add("And", nonzero, small)))
        output(f"{name}|flushed", count(add("And", nonzero, flushed)))
        output(f"{name}|small", add("ReduceSum", add("Where", small, size, zero), keepdims=0))
    return sources


def _first_bad_row(session: onnxruntime.InferenceSession, batch: Mapping[str, Array], name: str) -> int:
    """The first row that makes a tensor NaN or infinite alone; the last row where none does so alone."""
    rows = len(next(iter(batch.values())))
    for row in range(rows):
        if not _Seen().add(run_batch(session, {key: array[row : row + 1] for key, array in batch.items()}), name):
            return row
    return rows - 1


def _not_finite(name: str, row: int) -> RequestError:
    return RequestError(
        "an activation is NaN or infinite",
        f"tensor {name!r}, calibration sample {row}",
        "Leave the sample out, or mend the model: no range can be learned from it",
    )
