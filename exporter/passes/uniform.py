"""Values that are one number everywhere, and values that hold positions: what masks without a mask are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.passes.dims import volume
from exporter.passes.graphs import node_axes, reduced_axes, scalar
from exporter.passes.symbolic import Facts

if TYPE_CHECKING:
    import onnx_ir as ir

_MAX_ELEMENTS = 1 << 16

_COMPUTED: dict[str, Callable[..., Any]] = {
    "Add": np.add,
    "And": np.logical_and,
    "Div": np.true_divide,
    "Equal": np.equal,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "Mul": np.multiply,
    "Neg": np.negative,
    "Not": np.logical_not,
    "Or": np.logical_or,
    "Sub": np.subtract,
    "Where": np.where,
}

_MOVES = frozenset(("Expand", "Identity", "Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze"))


def positions(graph: ir.Graph, facts: Facts) -> dict[ir.Value, int]:
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
        elif node.op_type == "Unsqueeze" and (axes := node_axes(node)) is not None:
            inserted = {axis % len(shape) for axis in axes}
            kept = [axis for axis in range(len(shape)) if axis not in inserted]
            found[output] = kept[found[source]]
        elif node.op_type == "Expand":
            before = facts.shape(source)
            axis = found[source] - (len(before) if before is not None else 0)
            # Along the positions' own axis nothing may be repeated.
            if before is not None and shape[axis] == before[axis]:
                found[output] = axis + len(shape)
        elif node.op_type == "Identity":
            found[output] = found[source]
    return found


def uniform_values(graph: ir.Graph, facts: Facts, indices: dict[ir.Value, int]) -> dict[ir.Value, Any]:
    """Values that are the same number at every place, with that number as a NumPy scalar.

    It starts at scalars and at boolean constants (never at weights: that a bias happens to be zero is no reason to
    remove it) and at comparisons of positions with zero, and follows element-wise operators, sums and moves.
    """
    found: dict[ir.Value, Any] = {}
    for value in graph.initializers.values():
        number = _constant(value)
        if number is not None:
            found[value] = number
    for node in graph:
        if node.domain != "" or len(node.outputs) != 1 or None in node.inputs or not node.inputs:
            continue
        if (number := _number(node, facts, found, indices)) is not None:
            found[node.outputs[0]] = number
    return found


def _constant(value: ir.Value) -> Any:
    tensor = value.const_value
    if tensor is None or value.is_graph_input() or not 0 < tensor.size <= _MAX_ELEMENTS:
        return None
    boolean = str(tensor.dtype) == "BOOL"
    if tensor.size != 1 and not boolean:
        return None
    array = tensor.numpy()
    if array.dtype.kind not in "bif" or not (array == array.flat[0]).all():
        return None
    return array.flat[0]


def _number(node: ir.Node, facts: Facts, found: dict[ir.Value, Any], indices: dict[ir.Value, int]) -> Any:
    if node.op_type in ("GreaterOrEqual", "LessOrEqual"):
        side = 0 if node.op_type == "GreaterOrEqual" else 1
        bound = found.get(node.inputs[1 - side])
        if node.inputs[side] in indices and bound is not None and bound <= 0:
            return np.True_
    numbers = [found.get(value) for value in node.inputs]
    if node.op_type in _MOVES:
        return numbers[0]
    if node.op_type in ("ReduceSum", "ReduceMax", "ReduceMin"):
        return None if numbers[0] is None else _reduced(node, numbers[0], facts)
    if any(number is None for number in numbers):
        return None
    dtype = node.outputs[0].dtype
    if dtype is None:
        return None
    try:
        kind = dtype.numpy()
    except TypeError:
        return None
    if kind.kind not in "bif" or (node.op_type == "Div" and kind.kind != "f"):
        return None
    if node.op_type == "Cast":
        return np.asarray(numbers[0]).astype(kind)[()]
    compute = _COMPUTED.get(node.op_type)
    return None if compute is None else np.asarray(compute(*numbers)).astype(kind)[()]


def _reduced(node: ir.Node, number: Any, facts: Facts) -> Any:
    shape = facts.shape(node.inputs[0])
    axes = None if shape is None else reduced_axes(node, len(shape))
    if shape is None or axes is None:
        return None
    count = volume([shape[axis] for axis in axes])
    if node.op_type != "ReduceSum":
        return number
    if not count.static or np.asarray(number).dtype.kind == "b":
        return None
    return (np.asarray(number) * count.factor).astype(np.asarray(number).dtype)[()]
