"""What data say about a node that a rule fears without them: why it stays in FP32, with the figure, or why it need not.

Each answers ``None`` where nothing was measured of the node: then the rule's general reason stands. Two tolerances
judge precision, both the same for FP16 and BF16, which therefore bear different depths and slopes:

- A sum of n terms in a half type is off by up to n unit roundoffs u (N. J. Higham, Accuracy and Stability of Numerical
  Algorithms, 2nd ed., section 4.2): n u <= `MAX_SUM_ERROR`.
- A function with the condition number k magnifies its input's rounding: k u <= `MAX_MAGNIFIED_ERROR`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exporter.passes.graphs import scalar
from exporter.precision.depths import normalized_depth, reduction_depth, seen_dims, softmax_depth
from exporter.precision.facts import Decision, Facts, clear, decide
from exporter.precision.operators import SQUARING_SUMS
from exporter.precision.ranges import jsonable
from exporter.precision.schemas import HalfType, schema_of

if TYPE_CHECKING:
    import onnx_ir as ir

MAX_SUM_ERROR = 2.0**-6
"""Relative error of a sum that a half type may make: 32 terms in FP16, 4 in BF16."""
MAX_MAGNIFIED_ERROR = 2.0**-9
"""Relative error that a function may make of its input's rounding: four roundings of FP16, half of one of BF16."""

_SUMS_SQUARES = frozenset({"ReduceL2", "ReduceSumSquare"})
_EXPONENTIAL = frozenset({"Cos", "Cosh", "Exp", "Sin", "Sinh", "Softplus"})
"""Functions whose error is at most that of their input, in absolute terms, times their value (or 1)."""
_GENTLE = frozenset({"Asinh", "Atan", "Reciprocal"})
"""Functions with a condition number of at most 1."""


def sum_depth(half: HalfType) -> int:
    """How many terms a sum in a half type may have."""
    return int(MAX_SUM_ERROR / half.unit_roundoff)


def normalization(facts: Facts, node: ir.Node) -> Decision | None:
    """A variance: squares leave the range long before the values do, and it sums many of them.

    With ``stash_type`` 1 ONNX defines the statistics in FP32; the range of the squares is asked for all the same, as
    a runtime may take the operator apart. Rounding errors then count as those of random signs, which grow with the
    root of the depth (N. J. Higham and T. Mary, A New Approach to Probabilistic Rounding Error Analysis, 2019).
    """
    value = node.inputs[0]
    largest = facts.largest(value)
    if value is None or largest is None:
        return None
    half, square = facts.half, largest * largest
    depth, limit = normalized_depth(node), sum_depth(half) ** 2
    figures = {
        **_reached(facts, value, largest),
        "largest_square": jsonable(square),
        "depth": depth,
        "max_depth": limit,
    }
    if not square * facts.margin <= half.largest:
        why = f"{value.name} reached {largest:.4g}, whose square {square:.4g} leaves {half.name} with margin"
        return decide(node, "normalization", f"{why} {facts.margin:g}", **figures)
    schema = schema_of(node, facts.opsets)
    if schema is None or "stash_type" not in schema.attributes or node.attributes.get_int("stash_type", 1) != 1:
        why = f"its variance sums squares in {half.name}: {node.op_type} has no statistics of another type here"
        return decide(node, "normalization", why, **figures)
    if depth is None or depth > limit:
        summed = "a number of elements that is not fixed" if depth is None else f"{depth} elements"
        why = f"its mean and variance sum {summed}, beyond the {limit} that {half.name} bears; {value.name} reached"
        return decide(node, "normalization", f"{why} {largest:.4g}", **figures)
    why = (
        f"{value.name} reached {largest:.4g}, whose square {square:.4g} fits, and its statistics are FP32 by stash_type"
    )
    return clear(node, "normalization", why, **figures)


def softmax(facts: Facts, node: ir.Node) -> Decision | None:
    """Exponentials: their sum has a depth, and the rounding of a score is an error of its weight times the score."""
    value = node.inputs[0]
    found, largest = facts.measured(value), facts.largest(value)
    if value is None or found is None or largest is None:
        return None
    half, depth = facts.half, softmax_depth(node)
    seen, limit = softmax_depth(node, seen_dims(facts, value)), sum_depth(half)
    error = largest * half.unit_roundoff
    figures = {**_reached(facts, value, largest), "depth": depth, "depth_seen": seen, "max_depth": limit}
    figures["weight_error"] = jsonable(error)
    scores = f"its scores reached {largest:.4g}, where rounding moves a weight by {error:.2g}"
    if depth is None:
        longest = "" if seen is None else f" ({seen} seen)"
        return decide(node, "softmax", f"it sums over an axis whose length is not fixed{longest}; {scores}", **figures)
    if depth > limit:
        return decide(node, "softmax", f"it sums {depth} exponentials, more than {limit}; {scores}", **figures)
    if largest != found.largest or not error <= MAX_MAGNIFIED_ERROR:
        return decide(node, "softmax", scores if largest == found.largest else f"it is masked; {scores}", **figures)
    return clear(node, "softmax", f"it sums {depth} exponentials; {scores}", **figures)


def reduction(facts: Facts, node: ir.Node) -> Decision | None:
    """A sum of fixed depth: what adds up inside may leave the range although the result does not (a mean)."""
    value = node.inputs[0]
    largest = facts.largest(value)
    if value is None or largest is None:
        return None
    half, depth, limit = facts.half, reduction_depth(node), sum_depth(facts.half)
    figures = {**_reached(facts, value, largest), "depth": depth, "max_depth": limit}
    if depth is None:
        seen = reduction_depth(node, seen_dims(facts, value))
        longest = "" if seen is None else f" ({seen} elements seen)"
        why = f"it sums over an axis whose length is not fixed{longest}; {value.name} reached {largest:.4g}"
        return decide(node, "reduction", why, **figures, depth_seen=seen)
    if depth > limit:
        why = f"it sums {depth} elements, more than the {limit} that {half.name} bears"
        return decide(node, "reduction", f"{why}; {value.name} reached {largest:.4g}", **figures)
    squares = node.op_type in _SUMS_SQUARES
    if node.op_type in SQUARING_SUMS and not squares:
        return decide(
            node, "reduction", f"it multiplies or raises what it sums; {value.name} reached {largest:.4g}", **figures
        )
    inside = depth * (largest * largest if squares else largest)
    figures["largest_sum"] = jsonable(inside)
    what = f"{depth} {'squares' if squares else 'values'} of up to {largest:.4g} add up to {inside:.4g} at most"
    if not inside * facts.margin <= half.largest:
        return decide(node, "reduction", f"{what}, which leaves {half.name} with margin {facts.margin:g}", **figures)
    return clear(node, "reduction", f"{what}, which fits", **figures) if squares else None


def steep_function(facts: Facts, node: ir.Node) -> Decision | None:
    """A function that magnifies rounding: by how much its condition number at the measured values says."""
    value = node.inputs[0]
    largest = facts.largest(value)
    if value is None or largest is None:
        return None
    half, condition = facts.half, _condition(node, largest)
    figures = _reached(facts, value, largest)
    if condition is None:
        return decide(
            node,
            "steep_function",
            f"it magnifies rounding without bound at some values; {value.name} reached {largest:.4g}",
            **figures,
        )
    error = condition * half.unit_roundoff
    figures |= {"condition": jsonable(condition), "error": jsonable(error), "limit": MAX_MAGNIFIED_ERROR}
    if _divides(node) and (near := near_zero(facts, value)):
        return decide(node, "steep_function", near, **figures)
    told = f"{value.name} reached {largest:.4g}, where its rounding becomes an error of {error:.2g}"
    if not error <= MAX_MAGNIFIED_ERROR:
        return decide(node, "steep_function", told, **figures)
    return clear(node, "steep_function", told, **figures)


def division(facts: Facts, node: ir.Node) -> Decision | None:
    """Division by a computed value: no worse than a product where that stays away from zero."""
    value = node.inputs[1]
    found = facts.measured(value)
    if value is None or found is None:
        return None
    figures = {"value": value.name, "low": jsonable(found.low), "high": jsonable(found.high)}
    if near := near_zero(facts, value):
        return decide(node, "division", near, **figures)
    return clear(node, "division", f"its divisor {value.name} was {found.low:.4g} to {found.high:.4g}", **figures)


def square(facts: Facts, node: ir.Node) -> Decision | None:
    """A value times itself, whose measured result fits (else the rule measured_range has kept it)."""
    value = node.outputs[0]
    largest = facts.largest(value)
    if largest is None:
        return None
    return clear(node, "square", f"{value.name} reached {largest:.4g}, which fits", **_reached(facts, value, largest))


def near_zero(facts: Facts, value: ir.Value) -> str:
    """How close to zero a measured divisor came, in words; empty where it stayed a margin away from where the half
    type loses bits."""
    found = facts.measured(value)
    if found is None:
        return f"its divisor {value.name} was not measured"
    if not (found.low > 0 or found.high < 0):
        return f"its divisor {value.name} was {found.low:.4g} to {found.high:.4g}, zero between"
    least = min(abs(found.low), abs(found.high))
    if not least >= facts.margin * facts.half.smallest_normal:
        told = f"its divisor {value.name} fell to {least:.4g}, where {facts.half.name} loses bits"
        return f"{told} with margin {facts.margin:g}"
    return ""


def _condition(node: ir.Node, largest: float) -> float | None:
    """The condition number over magnitudes up to `largest`; ``None``: without bound, or not known."""
    if node.op_type in _EXPONENTIAL:
        return largest
    if node.op_type == "Pow":
        exponent = scalar(node.inputs[1])
        return None if exponent is None else abs(float(exponent))
    return 1.0 if node.op_type in _GENTLE else None


def _divides(node: ir.Node) -> bool:
    exponent = scalar(node.inputs[1]) if node.op_type == "Pow" else None
    return node.op_type == "Reciprocal" or (exponent is not None and float(exponent) < 0)


def _reached(facts: Facts, value: ir.Value, largest: float) -> dict[str, Any]:
    return {"value": value.name, "largest_abs": jsonable(largest), "margin": facts.margin}
