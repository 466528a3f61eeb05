"""Masks: index grids that only insert axes, comparisons that are always true, and broadcasts made too early."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.passes.base import Change
from exporter.passes.dims import ONE, Dim, Shape, broadcast
from exporter.passes.graphs import (
    add_constant,
    add_node,
    node_axes,
    producer,
    reduced_axes,
    replace_value,
)
from exporter.passes.repeated import RepeatedPass
from exporter.passes.symbolic import ELEMENTWISE, Facts, analyse
from exporter.passes.uniform import positions, uniform_values

if TYPE_CHECKING:
    import onnx_ir as ir


class SimplifyMasks(RepeatedPass):
    """Attention masks as small as they can be.

    PyTorch's vmap-made masks arrive as ``mask[batch_index, ..., key_index]`` over grids of positions (a `GatherND`),
    joined by ``and`` with comparisons that hold at every position, and broadcast over all queries before the mask is
    turned into numbers. Here the grid becomes an `Unsqueeze`, the comparison disappears, and element-wise work is done
    before a broadcast instead of after it: every value stays the same.
    """

    name = "masks"
    why = "masks are computed without index grids and without broadcasting them before they are used"

    def round(self, graph: ir.Graph) -> list[Change]:
        facts = analyse(graph)
        indices = positions(graph, facts)
        changes = _grids(graph, facts, indices)
        uniform = uniform_values(graph, facts, indices)
        return changes or _neutral(graph, facts, uniform) or _narrow(graph, facts, uniform)


def _grids(graph: ir.Graph, facts: Facts, indices: dict[ir.Value, int]) -> list[Change]:
    changes = []
    for node in list(graph):
        if node.op_type != "GatherND" or node.domain != "" or node.attributes.get_int("batch_dims", 0):
            continue
        axes = _inserted_axes(node, facts, indices)
        if axes is None:
            continue
        constant = add_constant(graph, np.array(axes, np.int64), "axes_" + "_".join(map(str, axes)))
        new = add_node(node, "Unsqueeze", [node.inputs[0], constant], node.outputs[0])
        if replace_value(node.outputs[0], new):
            changes.append(Change(node.name or "GatherND", "GatherND", f"its grid only inserts the axes {axes}"))
    return changes


def _inserted_axes(node: ir.Node, facts: Facts, indices: dict[ir.Value, int]) -> list[int] | None:
    """The axes that are new in ``data[i, j, ...]`` where every index is a position along an axis of its own."""
    data, grid = facts.shape(node.inputs[0]), producer(node.inputs[1], "Concat")
    if data is None or grid is None or len(grid.inputs) != len(data) or not data:
        return None
    axes, shapes = [], []
    for part in grid.inputs:
        column = producer(part, "Unsqueeze")
        shape = None if column is None else facts.shape(column.inputs[0])
        if column is None or shape is None or column.inputs[0] not in indices:
            return None
        if node_axes(column) not in ([-1], [len(shape)]):
            return None
        axes.append(indices[column.inputs[0]])
        shapes.append(shape)
    shape = shapes[0]
    last = grid.attributes.get_int("axis", 0) in (-1, len(shape))
    if not last or any(other != shape for other in shapes) or axes != sorted(set(axes)):
        return None
    others = [axis for axis in range(len(shape)) if axis not in axes]
    covered = all(shape[axis] == dim for axis, dim in zip(axes, data, strict=True))
    return others if covered and all(shape[axis] == ONE for axis in others) else None


def _neutral(graph: ir.Graph, facts: Facts, uniform: dict[ir.Value, Any]) -> list[Change]:
    """``x and True``, ``x + 0``, ``where(True, x, y)`` and the like, where `x` has the shape of the result."""
    changes = []
    for node in graph:
        kept, why = _only_input(node, uniform), "its other input changes nothing"
        if kept is None and node.op_type == "Where" and node.domain == "" and node.inputs[0] in uniform:
            kept, why = node.inputs[1 if uniform[node.inputs[0]] else 2], "its condition is the same everywhere"
        if kept is None or not facts.same_shape(kept, node.outputs[0]) or node.outputs[0] in uniform:
            continue
        if replace_value(node.outputs[0], kept):
            changes.append(Change(node.name or node.op_type, node.op_type, why))
    return changes


_NEUTRAL: dict[str, Any] = {"And": True, "Or": False, "Add": 0, "Sub": 0, "Mul": 1, "Div": 1}


def _only_input(node: ir.Node, uniform: dict[ir.Value, Any]) -> ir.Value | None:
    """The input that a node passes on (or broadcasts) because its other one is neutral."""
    if node.domain != "" or node.op_type not in _NEUTRAL:
        return None
    sides = ((0, 1),) if node.op_type in ("Sub", "Div") else ((0, 1), (1, 0))
    for kept, other in sides:
        number = uniform.get(node.inputs[other]) if node.inputs[other] is not None else None
        if number is not None and number == _NEUTRAL[node.op_type]:
            return node.inputs[kept]
    return None


def _narrow(graph: ir.Graph, facts: Facts, uniform: dict[ir.Value, Any]) -> list[Change]:
    """Do element-wise work before a broadcast: `narrow[v]` is a value that `v` is the broadcast of."""
    changes: list[Change] = []
    narrow: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if node.domain != "" or not node.outputs:
            continue
        output = node.outputs[0]
        if output in uniform:
            if (constant := _as_constant(graph, output, uniform[output], facts)) is not None:
                narrow[output] = constant
            continue
        if node.op_type == "Expand" and node.inputs[0] is not None and not facts.same_shape(node.inputs[0], output):
            narrow[output] = narrow.get(node.inputs[0], node.inputs[0])
            continue
        inputs = [narrow.get(v, v) if v is not None else None for v in node.inputs]
        if all(new is old for new, old in zip(inputs, node.inputs, strict=True)):
            # `x and y` is a broadcast of `x` where `y` is true everywhere but larger.
            if (kept := _only_input(node, uniform)) is not None:
                narrow[output] = kept
            continue
        shape = _narrowed_shape(node, inputs, facts)
        full = facts.shape(output)
        if shape is None or full is None:
            continue
        if shape == full:
            for index, value in enumerate(inputs):
                node.replace_input_with(index, value)
            changes.append(Change(node.name or node.op_type, node.op_type, "broadcasts its input by itself"))
            continue
        new = add_node(node, node.op_type, inputs, **_attributes(node))
        if output.dtype is not None:
            new.dtype, new.shape = output.dtype, _ir_shape(shape)
        facts.shapes[new] = shape
        narrow[output] = new
    # Operators and constants made for a narrow value that found no reader are dead and go; they are no change.
    return changes


def _as_constant(graph: ir.Graph, value: ir.Value, number: Any, facts: Facts) -> ir.Value | None:
    shape = facts.shape(value)
    if shape is None or all(dim == ONE for dim in shape):
        return None
    array = np.full((1,) * len(shape), number)
    return add_constant(graph, array, f"all_{number}_{len(shape)}d".lower().replace("-", "minus_"))


def _narrowed_shape(node: ir.Node, inputs: list[ir.Value | None], facts: Facts) -> Shape | None:
    shapes = [facts.shape(value) for value in inputs]
    known = [shape for shape in shapes if shape is not None]
    if node.op_type in ELEMENTWISE:
        return broadcast(known) if len(known) == len(shapes) else None
    if node.op_type == "Gather" and inputs[0] is node.inputs[0] and node.attributes.get_int("axis", 0) == 0:
        # Rows picked for one copy of the indices are the rows of every copy.
        return (*shapes[1], *shapes[0][1:]) if shapes[0] is not None and shapes[1] is not None else None
    if node.op_type not in ("ReduceSum", "ReduceMax", "ReduceMin") or not node.attributes.get_int("keepdims", 1):
        return None
    full = facts.shape(node.inputs[0])
    axes = None if full is None else reduced_axes(node, len(full))
    if full is None or axes is None or shapes[0] is None or len(shapes[0]) != len(full):
        return None
    reduced = set(axes)
    # A sum over an axis that was broadcast counts its copies: that one cannot be done before.
    if any(shapes[0][axis] != full[axis] for axis in reduced):
        return None
    return tuple(ONE if axis in reduced else dim for axis, dim in enumerate(shapes[0]))


def _attributes(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def _ir_shape(shape: Shape) -> ir.Shape:
    import onnx_ir as ir

    def recorded(dim: Dim) -> int | str | None:
        return dim.factor if dim.static else str(dim) if dim.known else None

    return ir.Shape([recorded(dim) for dim in shape])
