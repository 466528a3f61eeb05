"""Shape arithmetic: what `torch.export` computes at run time although the graph's symbolic shapes already say it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from exporter.passes.base import Change
from exporter.passes.dims import Dim, Shape
from exporter.passes.graphs import add_constant, add_node, integers, producer, replace_value
from exporter.passes.repeated import RepeatedPass
from exporter.passes.symbolic import Facts, analyse, permutation, slice_window

if TYPE_CHECKING:
    import onnx_ir as ir

_ALL = 2**31 - 1


class SimplifyShapes(RepeatedPass):
    """Reshapes with constant targets (``0`` copies a dimension, one ``-1`` is left to the runtime), no shape
    arithmetic that feeds nothing else, and no reshape, slice, expand, cast or transpose that does nothing.

    A target is made constant only where the symbolic shapes prove it; the parity check then runs it on real inputs.
    """

    name = "shapes"
    why = "shape arithmetic whose result follows from the shapes is replaced by constants, and no-ops are removed"

    def round(self, graph: ir.Graph) -> list[Change]:
        facts, changes = analyse(graph), []
        for node in list(graph):
            if node.domain != "" or not node.outputs:
                continue
            for rule in (*_RULES.get(node.op_type, ()), _constant_content):
                why = rule(node, facts, graph)
                if why is not None:
                    changes.append(Change(node.name or node.op_type, node.op_type, why))
                    break
        return changes + _share_contents(graph, facts)


def reshape_target(source: Shape, wanted: Shape) -> list[int] | None:
    """The constant second input of a `Reshape` from `source` to `wanted`, or ``None`` if constants cannot say it."""
    target = []
    for index, dim in enumerate(wanted):
        if dim.static and dim.factor > 0:
            target.append(dim.factor)
        elif index < len(source) and source[index] == dim:
            target.append(0)
        else:
            target.append(-1)
    return target if target.count(-1) <= 1 else None


def set_reshape(node: ir.Node, graph: ir.Graph, source: ir.Value, target: list[int]) -> None:
    """Let `node` reshape `source` to the constant `target`."""
    stem = "reshape_to_" + "_".join(str(t).replace("-1", "rest") for t in target)
    node.replace_input_with(0, source)
    node.replace_input_with(1, add_constant(graph, np.array(target, np.int64), stem))
    node.attributes.pop("allowzero", None)


def _constant_target(node: ir.Node, facts: Facts, graph: ir.Graph) -> str | None:
    source, wanted = facts.shape(node.inputs[0]), facts.shape(node.outputs[0])
    if source is None or wanted is None or node.inputs[0] is None:
        return None
    target, present = reshape_target(source, wanted), integers(node.inputs[1])
    if target is None or (present is not None and (-1 not in present or -1 in target)):
        return None
    set_reshape(node, graph, node.inputs[0], target)
    return f"its target follows from the shapes: {target}"


def _reshape_of_reshape(node: ir.Node, facts: Facts, graph: ir.Graph) -> str | None:
    first = producer(node.inputs[0], "Reshape")
    if first is None or first.inputs[0] is None:
        return None
    source, wanted = facts.shape(first.inputs[0]), facts.shape(node.outputs[0])
    target = None if source is None or wanted is None else reshape_target(source, wanted)
    if target is None:
        return None
    set_reshape(node, graph, first.inputs[0], target)
    return f"a reshape of the reshape {first.name} is one reshape"


def _same_shape(node: ir.Node, facts: Facts, graph: ir.Graph) -> str | None:
    source, output = node.inputs[0], node.outputs[0]
    if source is None or not facts.same_shape(source, output):
        return None
    return "its output has the shape of its input" if replace_value(output, source) else None


def _whole_slice(node: ir.Node, facts: Facts, graph: ir.Graph) -> str | None:
    shape, window = facts.shape(node.inputs[0]), slice_window(node)
    if shape is None or window is None or node.inputs[0] is None:
        return None
    for axis, (start, end, step) in window.items():
        dim = shape[axis]
        covers = end >= _ALL or (dim.static and end >= dim.factor)
        if start != 0 or step != 1 or not covers:
            return None
    return "it takes everything" if replace_value(node.outputs[0], node.inputs[0]) else None


def _same_type(node: ir.Node, facts: Facts, graph: ir.Graph) -> str | None:
    source = node.inputs[0]
    if source is None or source.dtype is None or node.attributes.get_int("to", 0) != source.dtype.value:
        return None
    return "it casts to the type that its input has" if replace_value(node.outputs[0], source) else None


def _transpose_of_transpose(node: ir.Node, facts: Facts, graph: ir.Graph) -> str | None:
    shape, output = facts.shape(node.outputs[0]), node.outputs[0]
    if shape is None or node.inputs[0] is None:
        return None
    perm = permutation(node, len(shape))
    if perm == sorted(perm):
        return "it moves no axis" if replace_value(output, node.inputs[0]) else None
    first = producer(node.inputs[0], "Transpose")
    if first is None or first.inputs[0] is None:
        return None
    inner = permutation(first, len(shape))
    merged = [inner[axis] for axis in perm]
    if merged == sorted(merged):
        return f"it undoes {first.name}" if replace_value(output, first.inputs[0]) else None
    new = add_node(node, "Transpose", [first.inputs[0]], output, perm=merged)
    return f"one transpose does what it and {first.name} do" if replace_value(output, new) else None


def _batched_transpose(node: ir.Node, facts: Facts, graph: ir.Graph) -> str | None:
    """``Reshape(Transpose(Reshape(x, [-1, m, n]), [0, 2, 1]), [..., n, m])``: torchlib's transpose of a key."""
    transpose = producer(node.inputs[0], "Transpose")
    flatten = producer(transpose.inputs[0], "Reshape") if transpose is not None else None
    if transpose is None or flatten is None or flatten.inputs[0] is None:
        return None
    source, flat, wanted = (facts.shape(v) for v in (flatten.inputs[0], flatten.outputs[0], node.outputs[0]))
    if source is None or flat is None or wanted is None or len(flat) != 3 or len(source) < 3:
        return None
    swapped = (*source[:-2], source[-1], source[-2])
    if permutation(transpose, 3) != [0, 2, 1] or flat[1:] != source[-2:] or wanted != swapped:
        return None
    rank = len(source)
    perm = [*range(rank - 2), rank - 1, rank - 2]
    new = add_node(node, "Transpose", [flatten.inputs[0]], node.outputs[0], perm=perm)
    return "one transpose does what its reshapes and transpose do" if replace_value(node.outputs[0], new) else None


def _constant_content(node: ir.Node, facts: Facts, graph: ir.Graph) -> str | None:
    """A shape tensor all of whose elements are integers."""
    output = node.outputs[0]
    content, shape = facts.contents.get(output), facts.shape(output)
    if content is None or shape is None or len(shape) > 1 or output.dtype is None or not output.uses():
        return None
    if any(not dim.static for dim in content) or (shape == () and len(content) != 1):
        return None
    numbers = [dim.factor for dim in content]
    array = np.array(numbers if shape else numbers[0], output.dtype.numpy())
    constant = add_constant(graph, array, "shape_" + "_".join(map(str, numbers)).replace("-", "minus"))
    return f"it is always {numbers}" if replace_value(output, constant) else None


def _share_contents(graph: ir.Graph, facts: Facts) -> list[Change]:
    """Shape tensors that are provably equal, although computed from different values, are read from the first."""
    changes = []
    first: dict[tuple[tuple[Dim, ...], bool, ir.DataType | None], ir.Value] = {}
    for node in graph:
        output = node.outputs[0] if node.outputs else None
        content = None if output is None else facts.contents.get(output)
        shape = facts.shape(output)
        if output is None or content is None or shape is None or len(shape) > 1 or not output.uses():
            continue
        kept = first.setdefault((content, shape == (), output.dtype), output)
        if kept is not output and kept.dtype is not None and replace_value(output, kept):
            changes.append(Change(node.name or node.op_type, node.op_type, f"always equal to {kept.name}"))
    return changes


Rule = Callable[["ir.Node", Facts, "ir.Graph"], str | None]

_RULES: dict[str, tuple[Rule, ...]] = {
    "Reshape": (_same_shape, _batched_transpose, _reshape_of_reshape, _constant_target),
    "Expand": (_same_shape,),
    "Slice": (_whole_slice,),
    "Cast": (_same_type,),
    "Transpose": (_transpose_of_transpose,),
}
