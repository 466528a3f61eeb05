"""Precision rules: each looks at a graph and names the nodes that stay in FP32, with the reason and figures.

Rules run in the order of registration; a node's first decision stands. Those marked `always` make the result valid
(what has no half type, what the caller asked for) and run whatever set is chosen; the others are the default policy.
Rules that follow values through the graph are in `exporter.precision.islands`. Where values were measured over data the
figures decide (`exporter.precision.measured`), else the operator does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exporter.errors import RequestError
from exporter.precision import measured
from exporter.precision.constants import describe
from exporter.precision.depths import reduction_depth, static_dims
from exporter.precision.facts import Decision, Facts, Rule, constant, decide, float_inputs, float_outputs
from exporter.precision.operators import COORDINATES, NORMALIZATIONS, SOFTMAXES, SQUARING_SUMS, STEEP, SUMS
from exporter.precision.ranges import FP16_SMALLEST_NORMAL, jsonable
from exporter.precision.schemas import Blocked, has_subgraphs, subgraphs, touches_float

if TYPE_CHECKING:
    import onnx_ir as ir

MAX_SUBNORMAL_SHARE = 0.5
MAX_SUBNORMAL_WEIGHT = 0.01
"""A value keeps its nodes FP32 when at least this share of its non-zero elements is below FP16's normal range and these
make at least this share of its sum of magnitudes: a runtime that takes them for zero would lose that much."""

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
    """Nodes that read or write a value whose measured magnitude, with a margin, leaves the half type's range."""
    limit = facts.half.largest / facts.margin
    for node in facts.open_nodes():
        for value in (*float_inputs(node), *float_outputs(node)):
            largest = facts.largest(value)
            if largest is not None and not largest <= limit:
                why = f"{value.name} reached {largest:.4g}, beyond {facts.half.name} with margin {facts.margin:g}"
                figures = {"value": value.name, "largest_abs": jsonable(largest), "limit": limit}
                yield decide(node, "measured_range", why, **figures, margin=facts.margin)
                break


@register_rule("attention_scores")
def attention_scores(facts: Facts) -> Iterator[Decision]:
    """Attention in one operator: its scores are nowhere to be measured, so their bound counts, |q| |k| depth scale."""
    for node in facts.open_nodes():
        if node.op_type != "Attention" or node.domain != "":
            continue
        query, key = facts.largest(node.inputs[0]), facts.largest(node.inputs[1])
        depth = head_size(node)
        if query is None or key is None or depth is None:
            continue
        bound = query * key * depth * node.attributes.get_float("scale", depth**-0.5)
        if not bound * facts.margin <= facts.half.largest:
            why = f"its scores may reach {bound:.4g} (queries reached {query:.4g}, keys {key:.4g}), beyond"
            figures = {"bound": jsonable(bound), "query_abs": jsonable(query), "key_abs": jsonable(key), "depth": depth}
            yield decide(node, "attention_scores", f"{why} {facts.half.name} with margin {facts.margin:g}", **figures)


@register_rule("subnormal")
def subnormal(facts: Facts) -> Iterator[Decision]:
    """Nodes that read or write a value which FP16 holds with fewer bits, or not at all.

    Both the number of such values and what they add to the sum of magnitudes have to be large: among the weights of
    a softmax most are tiny, and nothing is lost with them. (BF16 reaches as far down as FP32.)
    """
    if facts.half.smallest_normal < FP16_SMALLEST_NORMAL:
        return
    for node in facts.open_nodes():
        for value in (*float_inputs(node), *float_outputs(node)):
            found = facts.measured(value)
            if found is None or found.subnormal < MAX_SUBNORMAL_SHARE or found.subnormal_weight < MAX_SUBNORMAL_WEIGHT:
                continue
            why = (
                f"{found.subnormal:.1%} of {value.name}'s non-zero values lie below {facts.half.name}'s normal range "
                f"({found.flushed:.1%} become zero) and make {found.subnormal_weight:.1%} of its magnitude"
            )
            figures = {
                "value": value.name,
                "largest_abs": jsonable(found.largest),
                "subnormal": found.subnormal,
                "flushed": found.flushed,
                "subnormal_weight": found.subnormal_weight,
            }
            yield decide(node, "subnormal", why, **figures)
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
            yield measured.normalization(facts, node) or decide(
                node, "normalization", "its variance is a sum of squares over many elements"
            )


@register_rule("softmax")
def softmax(facts: Facts) -> Iterator[Decision]:
    """Softmax: exponentials, and a sum over an axis that is often dynamic."""
    for node in facts.open_nodes():
        if node.op_type in SOFTMAXES:
            yield measured.softmax(facts, node) or decide(node, "softmax", "exponentials and their sum over an axis")


@register_rule("reduction")
def reduction(facts: Facts) -> Iterator[Decision]:
    """Sums over many elements, over a dynamic axis, or of squares."""
    limit = measured.sum_depth(facts.half)
    for node in facts.open_nodes():
        if node.op_type not in SUMS:
            continue
        depth = reduction_depth(node)
        if facts.largest(node.inputs[0]) is not None:
            if (found := measured.reduction(facts, node)) is not None:
                yield found
        elif node.op_type in SQUARING_SUMS:
            yield decide(node, "reduction", "it multiplies or squares what it sums", depth=depth)
        elif depth is None:
            yield decide(node, "reduction", "it sums over an axis whose length is not fixed", depth=None)
        elif depth > limit:
            yield decide(node, "reduction", f"it sums {depth} elements", depth=depth, limit=limit)


@register_rule("steep_function")
def steep_function(facts: Facts) -> Iterator[Decision]:
    """Functions that magnify the rounding error of their input or leave the half type's range."""
    for node in facts.open_nodes():
        if node.op_type in STEEP:
            yield measured.steep_function(facts, node) or decide(
                node, "steep_function", "it magnifies its input's rounding error or leaves the range"
            )


@register_rule("division")
def division(facts: Facts) -> Iterator[Decision]:
    """Division by a computed value: it may be small, as in the normalization at the end of an embedding model."""
    for node in facts.open_nodes():
        if node.op_type == "Div" and not constant(node.inputs[1]):
            yield measured.division(facts, node) or decide(
                node, "division", "its divisor is computed and may be close to zero"
            )


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
        if squares_input(node):
            root = facts.half.largest**0.5
            yield measured.square(facts, node) or decide(
                node, "square", "it squares its input, whose range it doubles in exponent", safe_abs=root
            )


def squares_input(node: ir.Node) -> bool:
    """Whether the node multiplies a value by itself."""
    return node.op_type == "Mul" and node.inputs[0] is node.inputs[1]


def head_size(node: ir.Node) -> int | None:
    """Elements of a query of one head of an `Attention`; ``None`` where shapes don't say."""
    dims = static_dims(node.inputs[0])
    if dims is None or dims[-1] is None:
        return None
    return dims[-1] if len(dims) == 4 else dims[-1] // max(1, node.attributes.get_int("q_num_heads", 1))


def touches_float_inside(node: ir.Node) -> bool:
    """Whether floats cross the border of a control-flow node's subgraphs or are computed inside."""
    inside = (n for g in subgraphs(node) for n in g.all_nodes())
    return touches_float(node) or any(touches_float(n) for n in inside)
