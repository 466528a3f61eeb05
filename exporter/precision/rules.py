"""Precision rules: each looks at a graph and names the nodes that stay in FP32, with the reason and figures.

Rules run in the order of registration; a node's first decision stands. Those marked `always` make the result valid
(what has no half type, what the caller asked for) and run whatever set is chosen; the others are the default policy.
Rules that follow values through the graph are in `exporter.precision.islands`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from typing import TYPE_CHECKING

from exporter.errors import RequestError
from exporter.passes.graphs import reduced_axes
from exporter.precision.constants import describe
from exporter.precision.facts import Decision, Facts, Rule, constant, decide, float_inputs, float_outputs
from exporter.precision.operators import COORDINATES, NORMALIZATIONS, SOFTMAXES, SQUARING_SUMS, STEEP, SUMS
from exporter.precision.schemas import Blocked, has_subgraphs, subgraphs, touches_float

if TYPE_CHECKING:
    import onnx_ir as ir

MAX_HALF_DEPTH = 32
"""Sums over more elements than this stay FP32: some runtimes add up in the half type itself, and there the error may
grow by one unit roundoff per element."""

MAX_CONSTANT_ERROR = 4.0
"""A constant keeps its consumers FP32 when rounding it costs more than this many unit roundoffs (RMS, relative)."""


@dataclass(frozen=True)
class RegisteredRule:
    """A rule, its name, and whether it runs whatever set of rules is chosen."""

    name: str
    run: Rule
    always: bool = False


_RULES: dict[str, RegisteredRule] = {}


def register_rule(name: str, *, always: bool = False) -> Callable[[Rule], Rule]:
    """Decorator: make a rule known as `name`, after those registered before it."""

    def register(run: Rule) -> Rule:
        _RULES[name] = RegisteredRule(name, run, always)
        return run

    return register


def rules() -> dict[str, RegisteredRule]:
    """All rules by name, in the order in which they run."""
    import exporter.precision.islands  # noqa: F401 - registers the rules that follow values

    return dict(_RULES)


def apply_rules(facts: Facts, names: Sequence[str] | None = None) -> None:
    """Run rules over `facts`, which collects their decisions.

    Args:
        facts: The graph.
        names: The rules to run beside those that always run; ``None`` for all.

    Raises:
        RequestError: There is no rule of that name.
    """
    known = rules()
    if unknown := [name for name in names or () if name not in known]:
        raise RequestError("unknown precision rule", ", ".join(unknown), f"Known rules: {', '.join(known)}")
    for rule in known.values():
        if rule.always or names is None or rule.name in names:
            for found in list(rule.run(facts)):
                facts.add(found)


@register_rule("asked", always=True)
def asked(facts: Facts) -> Iterator[Decision]:
    """What the caller wants in FP32, by node name."""
    by_name = {str(node.name): node for node in facts.nodes}
    if unknown := [name for name in facts.asked if name not in by_name]:
        raise RequestError(
            "a node to keep in FP32 is not in the graph", ", ".join(unknown), "Name nodes as the FP32 model does"
        )
    for name in facts.asked:
        if facts.decidable(by_name[name]):
            yield decide(by_name[name], "asked", "asked for by the caller")


@register_rule("no_half_type", always=True)
def no_half_type(facts: Facts) -> Iterator[Decision]:
    """Operators whose schema allows no half type at the model's opset, or that have no schema."""
    for node in facts.open_nodes():
        slots = facts.slots(node)
        if isinstance(slots, Blocked):
            yield decide(node, "no_half_type", slots.why, opset=facts.opsets.get(node.domain))


@register_rule("control_flow", always=True)
def control_flow(facts: Facts) -> Iterator[Decision]:
    """If, Loop and Scan: what goes in and out stays FP32, so that branches agree; their bodies are converted."""
    for node in facts.nodes:
        if has_subgraphs(node) and touches_float_inside(node):
            yield decide(node, "control_flow", "values that enter and leave its subgraphs stay FP32; the bodies do not")


@register_rule("measured_range")
def measured_range(facts: Facts) -> Iterator[Decision]:
    """Nodes that read or write a value whose measured range, with a margin, leaves the half type's."""
    limit = facts.half.largest / facts.margin
    for node in facts.open_nodes():
        for value in (*float_inputs(node), *float_outputs(node)):
            low, high, _ = facts.ranges.get(str(value.name), (0.0, 0.0, 0.0))
            largest = max(abs(low), abs(high))
            if not largest <= limit:
                why = f"{value.name} reached {largest:.4g}, beyond {facts.half.name} with margin {facts.margin:g}"
                shown = largest if isfinite(largest) else str(largest)  # strict JSON has no NaN
                yield decide(
                    node, "measured_range", why, value=value.name, largest_abs=shown, limit=limit, margin=facts.margin
                )
                break


@register_rule("constant_precision")
def constant_precision(facts: Facts) -> Iterator[Decision]:
    """Nodes with a constant that the half type can't hold: it underflows (an epsilon of 1e-12) or rounds badly."""
    limit = MAX_CONSTANT_ERROR * facts.half.unit_roundoff
    for node in facts.open_nodes():
        for value in (v for v in float_inputs(node) if constant(v)):
            stats = facts.stats(value)
            divisor = node.op_type == "Div" and node.inputs[1] is value and stats.flushed > 0
            if stats.rms_relative > limit or divisor:
                why = f"constant {value.name} loses {stats.rms_relative:.2g} of its size in {facts.half.name}"
                if divisor:
                    why = f"divisor {value.name} has {stats.flushed} elements that become zero in {facts.half.name}"
                yield decide(node, "constant_precision", why, constant=value.name, limit=limit, **describe(stats))
                break


@register_rule("normalization")
def normalization(facts: Facts) -> Iterator[Decision]:
    """Normalizations: a variance is a sum of squares, which leaves the range of FP16 at |x| = 256."""
    for node in facts.open_nodes():
        if node.op_type in NORMALIZATIONS:
            yield decide(node, "normalization", "its variance is a sum of squares over many elements")


@register_rule("softmax")
def softmax(facts: Facts) -> Iterator[Decision]:
    """Softmax: exponentials, and a sum over an axis that is often dynamic."""
    for node in facts.open_nodes():
        if node.op_type in SOFTMAXES:
            yield decide(node, "softmax", "exponentials and their sum over an axis")


@register_rule("reduction")
def reduction(facts: Facts) -> Iterator[Decision]:
    """Sums over many elements, over a dynamic axis, or of squares."""
    for node in facts.open_nodes():
        if node.op_type not in SUMS:
            continue
        depth = reduction_depth(node)
        if node.op_type in SQUARING_SUMS:
            yield decide(node, "reduction", "it multiplies or squares what it sums", depth=depth)
        elif depth is None:
            yield decide(node, "reduction", "it sums over an axis whose length is not fixed", depth=None)
        elif depth > MAX_HALF_DEPTH:
            yield decide(node, "reduction", f"it sums {depth} elements", depth=depth, limit=MAX_HALF_DEPTH)


@register_rule("steep_function")
def steep_function(facts: Facts) -> Iterator[Decision]:
    """Functions that magnify the rounding error of their input or leave the half type's range."""
    for node in facts.open_nodes():
        if node.op_type in STEEP:
            yield decide(node, "steep_function", "it magnifies its input's rounding error or leaves the range")


@register_rule("division")
def division(facts: Facts) -> Iterator[Decision]:
    """Division by a computed value: it may be small, as in the normalization at the end of an embedding model."""
    for node in facts.open_nodes():
        if node.op_type == "Div" and not constant(node.inputs[1]):
            yield decide(node, "division", "its divisor is computed and may be close to zero")


@register_rule("coordinates")
def coordinates(facts: Facts) -> Iterator[Decision]:
    """Operators that take positions as floats."""
    for node in facts.open_nodes():
        if node.op_type in COORDINATES:
            yield decide(node, "coordinates", "it takes positions, whose error is a displacement")


@register_rule("square")
def square(facts: Facts) -> Iterator[Decision]:
    """A value times itself: its range is squared."""
    for node in facts.open_nodes():
        if node.op_type == "Mul" and node.inputs[0] is node.inputs[1]:
            root = facts.half.largest**0.5
            yield decide(node, "square", "it squares its input, whose range it doubles in exponent", safe_abs=root)


def touches_float_inside(node: ir.Node) -> bool:
    """Whether floats cross the border of a control-flow node's subgraphs or are computed inside."""
    inside = (n for g in subgraphs(node) for n in g.all_nodes())
    return touches_float(node) or any(touches_float(n) for n in inside)


def reduction_depth(node: ir.Node) -> int | None:
    """How many elements go into each result of a reduction; ``None`` where shapes or axes don't say."""
    value = node.inputs[0]
    shape = value.shape if value is not None else None
    if node.op_type in ("AveragePool", "LpPool"):
        kernel = node.attributes.get("kernel_shape")
        return None if kernel is None else prod(kernel.as_ints())
    if shape is None:
        return None
    dims: list[int | None] = [d if isinstance(d, int) else None for d in shape]
    axes = _depth_axes(node, len(dims))
    if axes is None:
        return None
    lengths = [dims[axis] for axis in axes]
    return None if any(n is None for n in lengths) else prod(n for n in lengths if n is not None)


def _depth_axes(node: ir.Node, rank: int) -> Iterable[int] | None:
    if node.op_type.startswith("Global"):
        return range(2, rank)
    if node.op_type in ("DFT", "STFT"):
        return None
    return reduced_axes(node, rank)
