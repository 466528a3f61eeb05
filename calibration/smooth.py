"""SmoothQuant: large values of single channels move from activations into weights before a graph is quantized.

One step serves all channels of a quantized activation, so a channel with large values leaves few integers to the
others. Weights have a step per output channel and bear more: with a positive `s` per channel, ``(x / s) @ (s * W)`` is
``x @ W``, and the channels of ``x / s`` are of like size (G. Xiao et al., "SmoothQuant: Accurate and Efficient
Post-Training Quantization for Large Language Models", 2022). The graph stays FP32 and computes the same to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.factors import (
    ALPHA,
    WORTH_AN_OPERATOR,
    Operands,
    by_what_they_share,
    choose_factors,
    group_record,
    no_gain,
    smoothing_record,
)
from calibration.folding import divide, makers
from calibration.quantize.products import Kept, output_axis, products, weight_of
from calibration.table import CalibrationTable, TensorStatistics
from exporter.passes.base import FUSED_RMS, Change, Pass, PassContext, PassRecord, run_pass

if TYPE_CHECKING:
    import onnx_ir as ir

Array = np.ndarray


@dataclass(frozen=True)
class Group:
    """Products that have one vector of factors, because they share an activation or a weight.

    Attributes:
        activations: What they read.
        nodes: The products, in graph order.
    """

    activations: tuple[ir.Value, ...]
    nodes: tuple[ir.Node, ...]

    def readers(self, value: ir.Value) -> list[ir.Node]:
        """The products that read one of the activations."""
        return [node for node in self.nodes if node.inputs[0] is value]


def smooth(model: ir.Model, table: CalibrationTable, alpha: float | None = ALPHA) -> dict[str, Any]:
    """Smooth the products with constant weights of an FP32 graph, in place.

    Where constants make an activation (a layer norm's scale and shift, a product's weights and bias) and only smoothed
    products read it, these constants are divided. Else a `Mul` in front of the products divides it: an operator more.
    A group of products whose rounding error is not expected to shrink stays as it is.

    Args:
        model: The graph that `table` was made of.
        table: Smallest and largest values per channel.
        alpha: See `smoothing_factors`; ``None`` takes for each group the one of `ALPHAS` that promises the least error.

    Returns:
        The record: ``alpha``; ``groups`` (products; per activation what it was ``folded`` into, or that an operator was
        ``inserted`` and why; alpha; range of the factors; ``expected_error``: the power of the rounding error as a
        share of what it was); ``inserted`` operators; ``kept``: products that were not smoothed, and why.

    Raises:
        RequestError: `alpha` is out of range, or the table lacks a tensor.
    """
    from exporter.passes.graphs import infer_missing

    infer_missing(model)
    groups, kept = find_groups(model, table)
    smoothed: list[dict[str, Any]] = []
    # All are judged by the weights as they came: folding changes the weights of products further up.
    plans = [(group, *_plan(group, table, alpha)) for group in groups]
    for group, chosen, factors, error in plans:
        made = {id(value): makers(value, group.readers(value), len(factors)) for value in group.activations}
        limit = WORTH_AN_OPERATOR if any(not found.nodes for found in made.values()) else 1.0
        if error >= limit:
            kept += [no_gain(str(node.name), node.op_type, chosen, error) for node in group.nodes]
            continue
        entries = [divide(model, value, group.readers(value), made[id(value)], factors) for value in group.activations]
        _multiply(model, group, factors)
        smoothed.append(group_record([str(node.name) for node in group.nodes], entries, chosen, factors, error))
    return smoothing_record(alpha, smoothed, kept)


def smooth_file(
    path_in: Path,
    path_out: Path,
    table: CalibrationTable,
    *,
    alpha: float | None = ALPHA,
    samples: Iterable[Mapping[str, Array]] = (),
    external_data: bool | None = None,
) -> dict[str, Any]:
    """Smooth a graph on disk, and prove on samples that it still computes the same.

    Args:
        path_in: The FP32 graph that `table` was made of.
        path_out: Where the smoothed graph goes; it is FP32 too, and has to be calibrated again for fixed ranges.
        table: See `smooth`.
        alpha: See `smooth`.
        samples: A few batches.
        external_data: As `exporter.onnx_files.save_model` has it.

    Returns:
        The record of `smooth`, and ``rms_relative``: the worst RMS relative difference of any output on the samples.
        Without ``groups`` nothing was smoothed, and nothing is written.

    Raises:
        RequestError: See `smooth`.
        InternalError: The outputs differ by more than rounding.
    """
    from exporter.onnx_files import load_model, save_model, strip_metadata
    from exporter.passes.graphs import remove_dead

    model = load_model(path_in)
    step = _Smooth(table, alpha)
    with PassContext(samples=[dict(sample) for sample in samples]) as context:
        checked = run_pass(step, model, context)
    if step.found["groups"]:
        remove_dead(model)
        strip_metadata(model)
        save_model(model, path_out, external_data=external_data)
    return {**step.found, "rms_relative": checked.rms_relative}


class _Smooth(Pass):
    """`smooth` as a graph pass, which is checked as all are."""

    name = "smooth"
    why = "the channels of an activation get like sizes, and int8 rounds it less"
    rms_bound = FUSED_RMS

    def __init__(self, table: CalibrationTable, alpha: float | None) -> None:
        self.table, self.alpha = table, alpha
        self.found: dict[str, Any] = {}

    def apply(self, model: ir.Model, context: PassContext) -> PassRecord:
        self.found = smooth(model, self.table, self.alpha)
        operators = {str(node.name): node.op_type for node in model.graph}
        names = [name for group in self.found["groups"] for name in group["products"]]
        why = "its weights take over a part of its input's range"
        return self.record(Change(name, operators[name], why) for name in names)


def find_groups(model: ir.Model, table: CalibrationTable) -> tuple[list[Group], list[Kept]]:
    """The products that can be smoothed, by what they share, in graph order; and the others, and why.

    Raises:
        RequestError: The table lacks a tensor.
    """
    kept: list[Kept] = []
    found: list[ir.Node] = []
    for node in products(model, attention=False):
        if refused := _refusal(node, table):
            kept.append(Kept(str(node.name), node.op_type, *refused))
        else:
            found.append(node)
    parts = by_what_they_share(found, lambda node: (id(node.inputs[0]), id(node.inputs[1])))
    return [_group(part) for part in parts], kept


def _group(nodes: list[ir.Node]) -> Group:
    values = {id(node.inputs[0]): node.inputs[0] for node in nodes}
    return Group(tuple(value for value in values.values() if value is not None), tuple(nodes))


def _refusal(node: ir.Node, table: CalibrationTable) -> tuple[str, str] | None:
    """Rule and reason why a product cannot be smoothed; ``None`` where it can."""
    if node.op_type == "Conv":
        return "convolution", "only matrix products are smoothed"
    transposed = node.attributes.get("transA")
    if transposed is not None and transposed.as_int():
        return "transposed_input", "it reads its input transposed: the channels are not its last axis"
    name = "" if node.inputs[0] is None else str(node.inputs[0].name)
    statistics = table.of(name)
    if statistics.constant:
        return "constant_input", f"its input {name!r} never changed in calibration"
    if len(statistics.channel_max) != len(_rows(node)):
        return "no_channels", f"calibration did not tell the channels of its input {name!r} apart"
    return None


def _plan(group: Group, table: CalibrationTable, alpha: float | None) -> tuple[float, Array, float]:
    operands = []
    for value in group.activations:
        seen = table.of(str(value.name))
        weights = [_rows(node) for node in group.readers(value)]
        operands.append(Operands(seen.channel_min, seen.channel_max, mean_squares(seen), weights))
    return choose_factors(operands, alpha)


def mean_squares(statistics: TensorStatistics) -> Array:
    """The mean square per channel, (channels,), estimated: as if values lay evenly over their channel's range.

    Where there is a histogram, all channels together get the mean square that it tells.
    """
    mean = statistics.channel_mean
    spread = (statistics.channel_max.astype(np.float64) - statistics.channel_min) ** 2 / 12
    histogram = statistics.histogram
    if histogram is None or not spread.any():
        return np.asarray(mean**2 + spread)
    middles = (histogram.edges[:-1] + histogram.edges[1:]) / 2
    square = float((histogram.counts * middles**2).sum()) / float(histogram.counts.sum())
    left = max(0.0, square * len(mean) - float((mean**2).sum()))
    return np.asarray(mean**2 + spread * (left / float(spread.sum())))


def _rows(node: ir.Node) -> Array:
    """The weight of a product, (input channels, output channels)."""
    weight = weight_of(node)
    assert weight is not None
    assert weight.const_value is not None
    array = weight.const_value.numpy()
    return array if output_axis(node) else array.T


def _multiply(model: ir.Model, group: Group, factors: Array) -> None:
    """Multiply the weights of a group per input channel."""
    from exporter.passes.graphs import add_constant

    made: dict[int, ir.Value] = {}
    for node in group.nodes:
        value = node.inputs[1]
        assert value is not None
        if id(value) not in made:
            rows = _rows(node) * factors[:, None]
            array = rows if output_axis(node) else rows.T
            made[id(value)] = add_constant(model.graph, array, f"{value.name}_smooth")
        node.replace_input_with(1, made[id(value)])
