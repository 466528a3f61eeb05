"""Precision rules that follow values through the graph: masks, positions, statistics, and what lies between FP32
nodes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from exporter.precision.constants import describe
from exporter.precision.facts import (
    ConstantChange,
    Decision,
    Facts,
    constant,
    consumers,
    decide,
    float_inputs,
    float_outputs,
    is_cast,
)
from exporter.precision.operators import BOUNDED, CONTRACTIONS, ELEMENTWISE, MOVEMENT, SOFTMAXES, SUMS
from exporter.precision.rules import register_rule, squares_input
from exporter.precision.schemas import has_subgraphs
from exporter.precision.trails import Spread, float_constants, spread

if TYPE_CHECKING:
    import onnx_ir as ir

_LARGE_CONSTANT_BYTES = 64 * 1024
_MASKED = {"Softmax": 0, "Attention": 3}
"""Operators that turn a very negative input at this index into a zero weight."""


@register_rule("constant_range")
def constant_range(facts: Facts) -> Iterator[Decision | ConstantChange]:
    """Finite constants beyond the half type's range, mostly masks (-1e9, the lowest FP32 number).

    The nodes that their values pass through, up to the softmax, stay FP32. Where the softmax is half, a mask that
    goes nowhere else is clamped to the lowest finite half number instead: its weights are zero either way as long as
    every row attends to something, which the input contract has to promise.
    """
    for value in float_constants(facts):
        stats = facts.stats(value)
        if not stats.beyond:
            continue
        trail = spread(value)
        figures = {"constant": value.name, "limit": facts.half.largest, **describe(stats)}
        if _only_masks(facts, trail) and facts.contract.attends:
            yield ConstantChange(
                str(value.name),
                "constant_range",
                f"a softmax mask: clamped to ±{facts.half.largest:.4g}, whose weights are zero as well",
                figures,
            )
            continue
        why = f"{value.name} holds {stats.largest:.4g}, beyond {facts.half.name}"
        for node in [*trail.passed, *(end for end, _ in trail.ends)]:
            if facts.decidable(node) and not facts.is_kept(node):
                yield decide(node, "constant_range", why, **figures)


@register_rule("positions")
def positions(facts: Facts) -> Iterator[Decision]:
    """Arithmetic on integers turned floats (positions, lengths, time steps): too large to be exact in half.

    It ends where such a value meets a computed one. Integers that the input contract bounds to what the half type
    holds exactly (a mask of 0 and 1) are free.
    """
    derived: set[ir.Value] = set()
    for node in facts.nodes:
        if is_cast(node) and _unbounded_integer(facts, node.inputs[0]):
            derived.update(float_outputs(node))
            continue
        inputs = float_inputs(node)
        if not any(v in derived for v in inputs) or not facts.decidable(node):
            continue
        if all(v in derived or constant(v) for v in inputs):
            if node.op_type not in BOUNDED:
                derived.update(float_outputs(node))
            if not facts.is_kept(node):
                why = f"it computes on integers, exact in {facts.half.name} up to {facts.half.largest_integer} only"
                yield decide(node, "positions", why, largest_exact=facts.half.largest_integer)


@register_rule("statistics")
def statistics(facts: Facts) -> Iterator[Decision]:
    """What is computed from a kept sum, up to and including the node that applies it (``x - mean``, ``x * rstd``).

    A sum of kept squares is kept as well, however short.
    """
    statistic: set[ir.Value] = set()
    squares: set[ir.Value] = set()
    for node in facts.nodes:
        decision = facts.kept.get(str(node.name))
        inputs = float_inputs(node)
        if decision is not None and (squares_input(node) or node.op_type == "Pow"):
            squares.update(float_outputs(node))
        of_squares = node.op_type in SUMS and any(v in squares for v in inputs)
        if of_squares or (decision is not None and decision.rule == "reduction"):
            statistic.update(float_outputs(node))
            if decision is None and facts.decidable(node):
                yield decide(node, "statistics", "it sums squares that are kept in FP32")
            continue
        if not any(v in statistic for v in inputs) or node.op_type not in MOVEMENT | ELEMENTWISE:
            continue
        pure = all(v in statistic or constant(v) for v in inputs)
        if pure:
            statistic.update(float_outputs(node))
        applies = node.op_type in ("Sub", "Mul", "Div") and not pure
        if (pure or applies) and facts.decidable(node) and not facts.is_kept(node):
            yield decide(node, "statistics", "it computes with a sum that is kept in FP32")


@register_rule("softmax_input")
def softmax_input(facts: Facts) -> Iterator[Decision]:
    """What scales, biases and masks the scores right before a kept softmax: no rounding between the two."""
    for softmax in facts.nodes:
        if not facts.is_kept(softmax) or softmax.op_type not in SOFTMAXES:
            continue
        value = softmax.inputs[0]
        node = value.producer() if value is not None else None
        while node is not None and node.op_type in ELEMENTWISE | {"Where"} and len(consumers(node)) == 1:
            if facts.decidable(node) and not facts.is_kept(node):
                yield decide(node, "softmax_input", f"it makes the scores of {softmax.name}, which is FP32")
            # Only one input can be the scores; the others (mask, bias, scale) have rules of their own.
            heavy = [v.producer() for v in float_inputs(node) if not constant(v)]
            node = heavy[0] if len(heavy) == 1 else None


@register_rule("between")
def between(facts: Facts) -> Iterator[Decision]:
    """Cheap nodes whose neighbours are all FP32: half precision would only add casts and rounding around them.

    Takes the largest set of nodes such that every float input comes from FP32, a constant or the set, and every
    consumer is FP32 or in the set.
    """
    region = {n for n in facts.open_nodes() if n.op_type not in CONTRACTIONS and not _reads_large_constant(n)}
    changed = True
    while changed:
        outside = {n for n in region if not _surrounded(facts, n, region)}
        region -= outside
        changed = bool(outside)
    for node in facts.nodes:
        if node in region:
            yield decide(node, "between", "everything around it is FP32, and it is too cheap to cast for")


def _reads_large_constant(node: ir.Node) -> bool:
    """Whether half precision pays for the node because it halves a table that it reads (an embedding)."""
    tensors = [v.const_value for v in float_inputs(node) if constant(v)]
    return any(t is not None and t.nbytes > _LARGE_CONSTANT_BYTES for t in tensors)


def _surrounded(facts: Facts, node: ir.Node, region: set[ir.Node]) -> bool:
    def fp32(neighbour: ir.Node | None) -> bool:
        return (
            neighbour is None
            or neighbour in region
            or facts.is_kept(neighbour)
            or is_cast(neighbour)
            or has_subgraphs(neighbour)
            or facts.follows(neighbour)
        )

    for value in float_inputs(node):
        if not constant(value) and facts.io_half and value.is_graph_input():
            return False
        if not fp32(value.producer()):
            return False
    for value in float_outputs(node):
        if facts.io_half and value.is_graph_output():
            return False
    return all(fp32(n) for n in consumers(node))


def _only_masks(facts: Facts, trail: Spread) -> bool:
    """Whether the values end in softmaxes that are half, and nowhere else."""
    if trail.reaches_output or not trail.ends or any(facts.is_kept(node) for node in trail.passed):
        return False
    for node, value in trail.ends:
        index = _MASKED.get(node.op_type)
        if index is None or facts.is_kept(node) or len(node.inputs) <= index or node.inputs[index] is not value:
            return False
    return True


def _unbounded_integer(facts: Facts, value: ir.Value | None) -> bool:
    """Whether a cast's input is an integer that may be larger than what the half type holds exactly."""
    import onnx_ir as ir

    if value is None or value.dtype is None or not value.dtype.is_integer() or value.dtype == ir.DataType.BOOL:
        return False
    while (producer := value.producer()) is not None and producer.op_type in MOVEMENT - {"Where", "Concat"}:
        source = producer.inputs[0]
        if source is None:
            return True
        value = source
    bounds = facts.contract.id_ranges.get(str(value.name)) if value.is_graph_input() else None
    return bounds is None or max(abs(bounds[0]), abs(bounds[1])) > facts.half.largest_integer
