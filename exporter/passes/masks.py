"""Masks: index grids that only insert axes, comparisons that are always true, and broadcasts made too early."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from exporter.passes.base import Change, Pass, PassContext, PassRecord
from exporter.passes.graphs import (
    add_constant,
    add_node,
    producer,
    reduced_axes,
    remove_dead,
    replace_value,
    scalar,
    small_constant,
)
from exporter.passes.symbolic import ELEMENTWISE, ONE, Dim, Facts, Shape, analyse, broadcast

if TYPE_CHECKING:
    import onnx_ir as ir

_ROUNDS = 8


class SimplifyMasks(Pass):
    """Attention masks as small as they can be.

    PyTorch's vmap-made masks arrive as ``mask[batch_index, ..., key_index]`` over grids of positions (a `GatherND`),
    joined by ``and`` with comparisons that hold at every position, and broadcast over all queries before the mask is
    turned into numbers. Here the grid becomes an `Unsqueeze`, the comparison disappears, and element-wise work is done
    before a broadcast instead of after it: every value stays the same.
    """

    name = "masks"
    why = "masks are computed without index grids and without broadcasting them before they are used"

    def apply(self, model: ir.Model, context: PassContext) -> PassRecord:
        changes: list[Change] = []
        for _ in range(_ROUNDS):
            found = _one_round(model.graph)
            remove_dead(model)
            changes += found
            if not found:
                break
        return self.record(changes)


def _one_round(graph: ir.Graph) -> list[Change]:
    facts = analyse(graph)
    positions = _positions(graph, facts)
    changes = _grids(graph, facts, positions) + _always_true(graph, facts, positions)
    return changes or _neutral(graph, facts) or _narrow(graph, facts)


def _positions(graph: ir.Graph, facts: Facts) -> dict[ir.Value, int]:
    """Values that hold, at every place, the index along one of their axes; with that axis."""
    found: dict[ir.Value, int] = {}
    for node in graph:
        if node.domain != "" or not node.outputs or not node.inputs:
            continue
        output, source = node.outputs[0], node.inputs[0]
        shape = facts.shape(output)
        if node.op_type == "Range":
            if scalar(source) == 0 and scalar(node.inputs[2]) == 1:
                found[output] = 0
        elif source not in found or shape is None or source is None:
            continue
        elif node.op_type == "Unsqueeze" and (axes := reduced_axes(node)) is not None:
            inserted = {axis % len(shape) for axis in axes}
            kept = [axis for axis in range(len(shape)) if axis not in inserted]
            found[output] = kept[found[source]]
        elif node.op_type == "Expand":
            before = facts.shape(source)
            axis = found[source] - (len(before) if before is not None else 0)
            # Along the positions' own axis nothing may be repeated.
            if before is not None and shape[axis] == before[axis]:
                found[output] = axis + len(shape)
        elif node.op_type in ("Identity", "Cast"):
            found[output] = found[source]
    return found


def _grids(graph: ir.Graph, facts: Facts, positions: dict[ir.Value, int]) -> list[Change]:
    changes = []
    for node in list(graph):
        if node.op_type != "GatherND" or node.domain != "" or node.attributes.get_int("batch_dims", 0):
            continue
        axes = _inserted_axes(node, facts, positions)
        if axes is None:
            continue
        constant = add_constant(graph, np.array(axes, np.int64), "axes_" + "_".join(map(str, axes)))
        new = add_node(node, "Unsqueeze", [node.inputs[0], constant], node.outputs[0])
        if replace_value(node.outputs[0], new):
            changes.append(Change(node.name or "GatherND", "GatherND", f"its grid only inserts the axes {axes}"))
    return changes


def _inserted_axes(node: ir.Node, facts: Facts, positions: dict[ir.Value, int]) -> list[int] | None:
    """The axes that are new in ``data[i, j, ...]`` where every index is a position along an axis of its own."""
    data, grid = facts.shape(node.inputs[0]), producer(node.inputs[1], "Concat")
    if data is None or grid is None or len(grid.inputs) != len(data) or not data:
        return None
    axes, shapes = [], []
    for part in grid.inputs:
        column = producer(part, "Unsqueeze")
        shape = None if column is None else facts.shape(column.inputs[0])
        if column is None or shape is None or column.inputs[0] not in positions:
            return None
        if reduced_axes(column) not in ([-1], [len(shape)]):
            return None
        axes.append(positions[column.inputs[0]])
        shapes.append(shape)
    shape = shapes[0]
    last = grid.attributes.get_int("axis", 0) in (-1, len(shape))
    if not last or any(other != shape for other in shapes) or axes != sorted(set(axes)):
        return None
    others = [axis for axis in range(len(shape)) if axis not in axes]
    covered = all(shape[axis] == dim for axis, dim in zip(axes, data, strict=True))
    return others if covered and all(shape[axis] == ONE for axis in others) else None


def _always_true(graph: ir.Graph, facts: Facts, positions: dict[ir.Value, int]) -> list[Change]:
    """``position >= 0`` (or less) and ``0 <= position``: a constant that still has the comparison's rank."""
    changes = []
    for node in list(graph):
        if node.domain != "" or node.op_type not in ("GreaterOrEqual", "LessOrEqual"):
            continue
        side = 0 if node.op_type == "GreaterOrEqual" else 1
        bound, shape = scalar(node.inputs[1 - side]), facts.shape(node.outputs[0])
        if node.inputs[side] not in positions or bound is None or bound > 0 or shape is None:
            continue
        true = add_constant(graph, np.ones((1,) * len(shape), bool), f"true_{len(shape)}d")
        target = add_node(node, "Shape", [node.inputs[side]])
        target.dtype = _int64()
        new = add_node(node, "Expand", [true, target], node.outputs[0])
        if replace_value(node.outputs[0], new):
            changes.append(Change(node.name or node.op_type, node.op_type, "no position is negative"))
    return changes


def _int64() -> ir.DataType:
    import onnx_ir as ir

    return ir.DataType.INT64


def _neutral(graph: ir.Graph, facts: Facts) -> list[Change]:
    """``x and True``, ``x or False``."""
    changes = []
    for node in graph:
        if node.domain != "" or node.op_type not in ("And", "Or"):
            continue
        for kept, other in (node.inputs, list(node.inputs)[::-1]):
            constant = small_constant(other)
            neutral = constant is not None and bool((constant == (node.op_type == "And")).all())
            if neutral and kept is not None and facts.same_shape(kept, node.outputs[0]):
                if replace_value(node.outputs[0], kept):
                    changes.append(Change(node.name or node.op_type, node.op_type, "its other input changes nothing"))
                break
    return changes


def _narrow(graph: ir.Graph, facts: Facts) -> list[Change]:
    """Do element-wise work before a broadcast: `narrow[v]` is a value that `v` is the broadcast of."""
    changes: list[Change] = []
    narrow: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if node.domain != "" or not node.outputs:
            continue
        output = node.outputs[0]
        if node.op_type == "Expand" and node.inputs[0] is not None and not facts.same_shape(node.inputs[0], output):
            narrow[output] = narrow.get(node.inputs[0], node.inputs[0])
            continue
        inputs = [narrow.get(v, v) if v is not None else None for v in node.inputs]
        if all(new is old for new, old in zip(inputs, node.inputs, strict=True)):
            # The output of `x and y` is a broadcast where one of them is all that matters.
            _note_neutral(node, facts, narrow)
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
        new.dtype, new.shape = output.dtype, _ir_shape(shape)
        facts.shapes[new] = shape
        narrow[output] = new
    # Operators made for a narrow value that found no reader are dead and go; they are no change.
    return changes


def _note_neutral(node: ir.Node, facts: Facts, narrow: dict[ir.Value, ir.Value]) -> None:
    if node.op_type not in ("And", "Or"):
        return
    for kept, other in (node.inputs, list(node.inputs)[::-1]):
        constant = small_constant(other)
        if kept is not None and constant is not None and bool((constant == (node.op_type == "And")).all()):
            narrow[node.outputs[0]] = kept
            return


def _narrowed_shape(node: ir.Node, inputs: list[ir.Value | None], facts: Facts) -> Shape | None:
    shapes = [facts.shape(value) for value in inputs]
    known = [shape for shape in shapes if shape is not None]
    if node.op_type in ELEMENTWISE:
        return broadcast(known) if len(known) == len(shapes) else None
    if node.op_type not in ("ReduceSum", "ReduceMax", "ReduceMin") or not node.attributes.get_int("keepdims", 1):
        return None
    full, axes = facts.shape(node.inputs[0]), reduced_axes(node)
    if full is None or axes is None or shapes[0] is None or len(shapes[0]) != len(full):
        return None
    rank = len(full)
    reduced = {axis % rank for axis in axes}
    # A sum over an axis that was broadcast counts its copies: that one cannot be done before.
    if any(shapes[0][axis] != full[axis] for axis in reduced):
        return None
    return tuple(ONE if axis in reduced else dim for axis, dim in enumerate(shapes[0]))


def _attributes(node: ir.Node) -> dict[str, object]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def _ir_shape(shape: Shape) -> ir.Shape:
    import onnx_ir as ir

    def recorded(dim: Dim) -> int | str | None:
        return dim.factor if dim.static else str(dim) if dim.known else None

    return ir.Shape([recorded(dim) for dim in shape])
