"""Calibration: one pass over the data for ranges, a second for histograms. No activation outlives its batch.

The ranges are reduced inside the graph, which hands out a few numbers per tensor. Both passes give partial results that
merge exactly and in any order, so that the batches may be split over processes or machines: minima and maxima, integer
counts, and sums in fixed point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.observers import BINS, Histogram
from calibration.observing import observed_session, run_batch
from calibration.table import CalibrationTable, TensorStatistics
from exporter.errors import RequestError

if TYPE_CHECKING:
    import onnx_ir as ir
    import onnxruntime

Array = np.ndarray
Samples = Callable[[], Iterable[Mapping[str, Array]]]
"""Gives the batches anew each time it is called, the same ones in the same order."""

_FRACTION = 2.0**40
_STATISTICS = ("min", "max", "sum")
_AXES_ARE_INPUTS = {"ReduceMin": 18, "ReduceMax": 18, "ReduceSum": 13}
"""From which opset on: before, axes are an attribute. In the order of `_STATISTICS`."""


@dataclass(frozen=True)
class RangePart:
    """Ranges and sums of one tensor over some batches, per channel.

    Attributes:
        low, high: Smallest and largest value, float32 (channels,).
        whole, fraction: The sum in fixed point, int64 (channels,): units of 1 and of 2^-40. Integers add up to the
            same whatever their order.
        count: Values per channel.
    """

    low: Array
    high: Array
    whole: Array
    fraction: Array
    count: int

    @classmethod
    def of(cls, low: Array, high: Array, total: Array, count: int) -> RangePart:
        """From the reductions of one batch."""
        wide = total.astype(np.float64)
        whole = np.trunc(wide)
        return cls(low, high, whole.astype(np.int64), np.trunc((wide - whole) * _FRACTION).astype(np.int64), count)

    def merge(self, other: RangePart) -> RangePart:
        """Of both parts' batches."""
        return RangePart(
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
            self.whole + other.whole,
            self.fraction + other.fraction,
            self.count + other.count,
        )

    @property
    def mean(self) -> Array:
        return (self.whole + self.fraction / _FRACTION) / max(self.count, 1)


@dataclass(frozen=True)
class Ranges:
    """What a range pass over some batches found: a part per tensor, and how much was seen."""

    parts: Mapping[str, RangePart]
    samples: int = 0
    batches: int = 0

    def merge(self, other: Ranges) -> Ranges:
        names = {**self.parts, **other.parts}
        parts = {
            name: self.parts[name].merge(other.parts[name])
            if name in self.parts and name in other.parts
            else names[name]
            for name in names
        }
        return Ranges(parts, self.samples + other.samples, self.batches + other.batches)


Histograms = Mapping[str, Histogram]


def merge_histograms(a: Histograms, b: Histograms) -> dict[str, Histogram]:
    """The histograms of both parts, which were taken over the same ranges."""
    shared = {name: a[name].merge(b[name]) for name in a if name in b}
    return {**a, **b, **shared}


def collect(
    model: Path,
    samples: Samples,
    tensors: Sequence[str],
    *,
    threads: int = 1,
    histograms: bool = True,
    bins: int = BINS,
    origin: str = "",
    digest: str = "",
) -> CalibrationTable:
    """Calibrate in one process: the range pass, then (if asked for) the histogram pass.

    Args:
        model: The FP32 ONNX graph.
        samples: The batches.
        tensors: Names of the float tensors to observe.
        threads: Of ONNX Runtime; one number gives one result, bit for bit.
        histograms: Take histograms too.
        bins: Of each histogram.
        origin: Of the data, kept in the table.
        digest: Of the data, kept in the table.

    Raises:
        RequestError: There are no samples, or an activation is NaN or infinite: names the tensor and the sample.
    """
    ranges = collect_ranges(model, samples(), tensors, threads=threads)
    found = collect_histograms(model, samples(), ranges, threads=threads, bins=bins) if histograms else {}
    return make_table(ranges, found, origin=origin, digest=digest)


def make_table(ranges: Ranges, histograms: Histograms, *, origin: str = "", digest: str = "") -> CalibrationTable:
    """The table of (merged) parts.

    Raises:
        RequestError: No batch was seen.
    """
    if not ranges.batches:
        raise RequestError("there are no calibration samples", origin or None, "Give data with at least one row")
    tensors = {
        name: TensorStatistics(part.low, part.high, part.mean, part.count, histograms.get(name))
        for name, part in ranges.parts.items()
    }
    notes = []
    if ranges.samples == 1:
        notes.append("one sample alone was seen: ranges may be too narrow for others")
    if still := [name for name, stats in tensors.items() if stats.constant]:
        notes.append(f"tensors that never changed: {', '.join(still)}")
    return CalibrationTable(tensors, ranges.samples, ranges.batches, origin, digest, tuple(notes))


def collect_ranges(
    model: Path, samples: Iterable[Mapping[str, Array]], tensors: Sequence[str], *, threads: int = 1
) -> Ranges:
    """The range pass over some batches: minima, maxima and sums per channel, reduced inside the graph.

    A channel is an index of the last axis, where that has a fixed size; other tensors count as one channel.
    """
    from exporter.onnx_files import load_model

    graph = load_model(model)
    values = _values(graph, tensors)
    for name, value in values.items():
        _observe(graph, name, value)
    parts: dict[str, RangePart] = {}
    seen = batches = 0
    with observed_session(graph, threads) as session:
        for batch in samples:
            found = run_batch(session, batch, [f"{name}|{kind}" for name in values for kind in (*_STATISTICS, "count")])
            _refuse_non_finite(session, batch, found, list(values), seen)
            for name in values:
                part = RangePart.of(
                    np.atleast_1d(found[f"{name}|min"]),
                    np.atleast_1d(found[f"{name}|max"]),
                    np.atleast_1d(found[f"{name}|sum"]),
                    int(found[f"{name}|count"]) // max(1, np.atleast_1d(found[f"{name}|min"]).size),
                )
                parts[name] = parts[name].merge(part) if name in parts else part
            seen, batches = seen + _rows(batch), batches + 1
    return Ranges(parts, seen, batches)


def collect_histograms(
    model: Path, samples: Iterable[Mapping[str, Array]], ranges: Ranges, *, threads: int = 1, bins: int = BINS
) -> dict[str, Histogram]:
    """The histogram pass over some batches, over the (merged) ranges of all batches."""
    from exporter.onnx_files import load_model

    graph = load_model(model)
    values = _values(graph, list(ranges.parts))
    found = {
        name: Histogram.empty(float(part.low.min()), float(part.high.max()), bins)
        for name, part in ranges.parts.items()
    }
    for value in values.values():
        if not value.is_graph_output():
            graph.graph.outputs.append(value)
    with observed_session(graph, threads) as session:
        for batch in samples:
            arrays = run_batch(session, batch, list(values))
            for name in values:
                found[name] = found[name].add(arrays.pop(name))
    return found


def _values(graph: ir.Model, tensors: Sequence[str]) -> dict[str, ir.Value]:
    from exporter.passes.graphs import infer_missing

    infer_missing(graph)
    known: dict[str, ir.Value] = {str(value.name): value for value in graph.graph.inputs}
    known |= {str(value.name): value for node in graph.graph for value in node.outputs if value.name}
    if missing := [name for name in tensors if name not in known]:
        raise RequestError("the graph has no such tensor to observe", missing[0], "Name values of this graph")
    return {name: known[name] for name in tensors}


def _observe(graph: ir.Model, name: str, value: ir.Value) -> None:
    """Add a tensor's reductions to the graph, as outputs ``name|min``, ``name|max``, ``name|sum``, ``name|count``."""
    import onnx_ir as ir

    dims = [] if value.shape is None else list(value.shape)
    rank = len(dims)
    channels = dims[-1] if rank > 1 and isinstance(dims[-1], int) else None
    # One axis first, then the others: ONNX Runtime reduces many short columns, or rows, up to six times as fast as few
    # long ones, and reduces a whole tensor on one thread.
    steps: list[list[int]] = [[-1], []] if rank > 1 else [[]]
    if channels is not None:
        steps = [[-2], list(range(rank - 2))] if rank > 2 else [[0]]
    for kind, op_type in zip(_STATISTICS, _AXES_ARE_INPUTS, strict=True):
        reduced = value
        for step in steps[:-1]:
            graph.graph.append(_reduction(graph, op_type, reduced, step))
            reduced = graph.graph[-1].outputs[0]
        node = _reduction(graph, op_type, reduced, steps[-1])
        _output(graph, node, f"{name}|{kind}", ir.DataType.FLOAT, [] if channels is None else [channels])
    _output(graph, ir.node("Size", [value]), f"{name}|count", ir.DataType.INT64, [])


def _reduction(graph: ir.Model, op_type: str, value: ir.Value, axes: Sequence[int]) -> ir.Node:
    """The node that reduces some axes, without any all of them, as the graph's opset writes it."""
    import onnx_ir as ir

    from exporter.passes.graphs import add_constant

    if not axes:
        return ir.node(op_type, [value], attributes={"keepdims": 0})
    if graph.graph.opset_imports.get("", 1) < _AXES_ARE_INPUTS[op_type]:
        return ir.node(op_type, [value], attributes={"keepdims": 0, "axes": list(axes)})
    named = add_constant(graph.graph, np.array(axes, np.int64), "observed_axes")
    return ir.node(op_type, [value, named], attributes={"keepdims": 0})


def _output(graph: ir.Model, node: ir.Node, name: str, dtype: ir.DataType, shape: Sequence[Any]) -> None:
    import onnx_ir as ir

    graph.graph.append(node)
    output = node.outputs[0]
    output.name, output.dtype, output.shape = name, dtype, ir.Shape(shape)
    graph.graph.outputs.append(output)


def _rows(batch: Mapping[str, Array]) -> int:
    return len(next(iter(batch.values())))


def _refuse_non_finite(
    session: onnxruntime.InferenceSession,
    batch: Mapping[str, Array],
    found: Mapping[str, Array],
    tensors: Sequence[str],
    seen: int,
) -> None:
    """A range with NaN or infinity is none: say where that came from. (A sum takes up a NaN; a maximum may not.)"""
    bad = [name for name in tensors if not all(np.isfinite(found[f"{name}|{kind}"]).all() for kind in _STATISTICS)]
    if not bad:
        return
    first = bad[0]
    row = 0
    for row in range(_rows(batch)):
        alone = run_batch(
            session, {k: a[row : row + 1] for k, a in batch.items()}, [f"{first}|{k}" for k in _STATISTICS]
        )
        if not all(np.isfinite(array).all() for array in alone.values()):
            break
    raise RequestError(
        "an activation is NaN or infinite (or its sum leaves FP32)",
        f"tensor {first!r}, calibration sample {seen + row}",
        "Leave the sample out, or mend the model: no range can be learned from it",
    )
