"""Where the values of a constant go, and which sides of a measured range a mask explains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from exporter.precision.facts import Facts, constant, float_outputs
from exporter.precision.operators import ELEMENTWISE, MOVEMENT
from exporter.precision.schemas import has_subgraphs, is_float

if TYPE_CHECKING:
    import onnx_ir as ir

CARRIES_RANGE = MOVEMENT | (ELEMENTWISE - {"Pow", "Reciprocal", "Sqrt", "Div"})


@dataclass
class Spread:
    """Where the values of a constant go: the nodes they pass, and the nodes at which they end."""

    passed: list[ir.Node] = field(default_factory=list)
    ends: list[tuple[ir.Node, ir.Value]] = field(default_factory=list)
    reaches_output: bool = False


def spread(value: ir.Value) -> Spread:
    """Follow a value through operators that carry its range on."""
    result = Spread()
    seen: set[ir.Node] = set()
    pending = [value]
    while pending:
        current = pending.pop()
        result.reaches_output |= current.is_graph_output()
        for use in current.uses():
            node = use.node
            if node.op_type not in CARRIES_RANGE or has_subgraphs(node):
                result.ends.append((node, current))
            elif node not in seen:
                seen.add(node)
                result.passed.append(node)
                pending.extend(float_outputs(node))
    return result


def float_constants(facts: Facts) -> Iterator[ir.Value]:
    """The float constants of all graphs."""
    for graph in facts.model.graphs():
        for value in graph.initializers.values():
            if is_float(value) and constant(value):
                yield value


def explained_sides(facts: Facts) -> dict[ir.Value, set[str]]:
    """Per value that a constant beyond the half type reaches (a mask of -1e9 or -inf): ``low`` or ``high``, the side
    of its range that this constant explains.

    Such a side says nothing about computed values. What becomes of the constant is decided by the rule constant_range.
    """
    found: dict[ir.Value, set[str]] = {}
    for value in float_constants(facts):
        stats = facts.stats(value)
        if not stats.beyond and not stats.non_finite:
            continue
        array = value.const_value.numpy()
        sides = {
            side
            for side, beyond in (("low", array < -facts.half.largest), ("high", array > facts.half.largest))
            if beyond.any()
        }
        for node in spread(value).passed:
            for output in float_outputs(node):
                found.setdefault(output, set()).update(sides)
    return found
