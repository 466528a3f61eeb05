"""Small helpers over `onnx_ir` graphs that the passes share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.passes.base import Change

if TYPE_CHECKING:
    import onnx_ir as ir

SMALL_CONSTANT_ELEMENTS = 64
"""Constants up to this size are shapes, axes and scalars; only those are read for their values."""


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes `value`, if it is a standard `op_type`."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type and node.domain == "" else None


def small_constant(value: ir.Value | None) -> np.ndarray | None:
    """`value` as an array if it is a constant of at most `SMALL_CONSTANT_ELEMENTS` elements."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    if value.const_value.size > SMALL_CONSTANT_ELEMENTS:
        return None
    return value.const_value.numpy()


def scalar(value: ir.Value | None) -> Any:
    """The only element of a constant, else ``None``."""
    array = small_constant(value)
    return array.reshape(()).item() if array is not None and array.size == 1 else None


def integers(value: ir.Value | None) -> list[int] | None:
    """The elements of a small integer constant of rank 0 or 1, else ``None``."""
    array = small_constant(value)
    if array is None or array.dtype.kind != "i" or array.ndim > 1:
        return None
    return [int(i) for i in np.atleast_1d(array)]


def node_axes(node: ir.Node) -> list[int] | None:
    """The axes that a node names, as its second input or, in older opsets, as an attribute; ``None`` where it doesn't.

    For a reduction, `reduced_axes` says what they mean.
    """
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        return integers(node.inputs[1])
    attribute = node.attributes.get("axes")
    return None if attribute is None else [int(axis) for axis in attribute.as_ints()]


def reduced_axes(node: ir.Node, rank: int) -> list[int] | None:
    """The axes, from 0, over which a reduction of a tensor of this rank goes; ``None`` where only the inputs tell.

    No axes and an empty list of them mean all, or none with ``noop_with_empty_axes``.
    """
    named = node_axes(node)
    if named is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        return None
    if not named:
        return [] if node.attributes.get_int("noop_with_empty_axes", 0) else list(range(rank))
    return [axis % rank for axis in named] if rank else None


def value_names(graph: ir.Graph) -> set[str]:
    """The names of all values in a graph and in the branches and bodies inside it."""
    values = [*graph.inputs, *graph.initializers.values()]
    for node in graph.all_nodes():
        values.extend(node.outputs)
        for attribute in node.attributes.values():
            for inner in _graphs_of(attribute):
                values.extend((*inner.inputs, *inner.initializers.values()))
    return {value.name for value in values if value.name}


def _graphs_of(attribute: ir.Attr) -> Sequence[ir.Graph]:
    import onnx_ir as ir

    if attribute.type == ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    return attribute.as_graphs() if attribute.type == ir.AttributeType.GRAPHS else ()


def add_constant(graph: ir.Graph, array: np.ndarray, stem: str) -> ir.Value:
    """An initializer with the values of `array`, named after `stem`; one of the same name and values is used again."""
    import onnx_ir as ir

    taken, name, number = value_names(graph), stem, 0
    while name in taken:
        existing = graph.initializers.get(name)
        tensor = None if existing is None else existing.const_value
        same_kind = tensor is not None and tensor.size == array.size and tensor.dtype.numpy() == array.dtype
        if existing is not None and same_kind and tensor is not None and np.array_equal(tensor.numpy(), array):
            return existing
        number += 1
        name = f"{stem}_{number}"
    value = ir.Value(name=name, const_value=ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name))
    value.dtype, value.shape = ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape)
    graph.register_initializer(value)
    return value


def add_node(
    before: ir.Node,
    op_type: str,
    inputs: list[ir.Value | None],
    like: ir.Value | None = None,
    *,
    domain: str = "",
    **attributes: Any,
) -> ir.Value:
    """The output of a new one-output node in front of `before`, with the shape and type of `like`.

    It belongs to the module of `before` and is named after it, so that names by module stay right.
    """
    import onnx_ir as ir

    node = ir.node(op_type, inputs, domain=domain, attributes=attributes)
    node.metadata_props.update(before.metadata_props)
    if before.name and "/" in before.name:
        node.name = f"{before.name.rpartition('/')[0]}/{op_type}"
    if before.graph is None:
        raise ValueError("the node is in no graph")
    before.graph.insert_before(before, node)
    output = node.outputs[0]
    if like is not None and like.dtype is not None:
        output.dtype = like.dtype
        output.shape = None if like.shape is None else like.shape.copy()
    return output


def replace_value(old: ir.Value, new: ir.Value) -> bool:
    """Let every reader of `old` read `new`; where `old` is an output of the graph, `new` takes its name.

    Returns:
        Whether it was done: an input, a constant or another output cannot become an output under a new name.
    """
    if old.is_graph_output():
        made_by, made_before_by = new.producer(), old.producer()
        same_graph = made_by is not None and made_before_by is not None and made_by.graph is made_before_by.graph
        if not same_graph or new.is_graph_output():
            return False
        name = old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name, new.name = f"{name}_replaced", name
        new.shape = old.shape if old.shape is None else old.shape.copy()
        return True
    old.replace_all_uses_with(new)
    return True


def remove_identities(model: ir.Model) -> None:
    """Remove every `Identity` but those that give a graph (or the branch or body of a node) an output of its own.

    onnx_ir's own pass takes the identity from a branch that hands an outer value through, which makes the branch's
    output a value that the branch does not have.
    """
    for node in list(model.graph.all_nodes()):
        if node.op_type != "Identity" or node.domain != "" or node.graph is None or node.inputs[0] is None:
            continue
        value, output = node.inputs[0], node.outputs[0]
        value.type = output.type if value.type is None else value.type
        value.shape = output.shape if value.shape is None else value.shape
        if output.is_graph_output():
            made_by = value.producer()
            if made_by is None or made_by.graph is not node.graph or value.is_graph_output():
                continue
            value.shape = value.shape if output.shape is None else output.shape
            output.replace_all_uses_with(value, replace_graph_outputs=True)
            value.name, output.name = output.name, f"{output.name}_removed"
        else:
            output.replace_all_uses_with(value)
        node.graph.remove(node, safe=True)


def remove_dead(model: ir.Model) -> None:
    """Remove nodes, initializers, functions and opset imports that nothing reads."""
    from onnx_ir.passes import common

    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)
    common.RemoveUnusedOpsetsPass()(model)


def infer_missing(model: ir.Model) -> None:
    """Let ONNX infer the types and shapes that the file does not record, if any are missing. Weights are left out."""
    from onnx_ir.passes.common import ShapeInferencePass

    if any(out.dtype is None or out.shape is None for node in model.graph for out in node.outputs if out.name):
        ShapeInferencePass(strict_mode=False)(model)


class Diff:
    """Which nodes a library's pass removed and added: a snapshot to be taken before it runs."""

    def __init__(self, model: ir.Model) -> None:
        self._before = [(node, node.name or node.op_type, node.op_type) for node in model.graph.all_nodes()]
        self._weights = [(id(v), name) for g in model.graphs() for name, v in g.initializers.items()]

    def changes(self, model: ir.Model, removed: str, added: str, weights: str | None = None) -> list[Change]:
        """The changes since, with the reason for what was removed and for what was added.

        Args:
            model: After the library's pass.
            removed: Why nodes went.
            added: Why nodes came.
            weights: Why initializers went; ``None`` leaves them out.
        """
        name_missing_nodes(model)
        known = {id(node) for node, _, _ in self._before}
        now = {id(node) for node in model.graph.all_nodes()}
        changes = [Change(name, op, removed) for node, name, op in self._before if id(node) not in now]
        changes += [
            Change(node.name or node.op_type, node.op_type, added)
            for node in model.graph.all_nodes()
            if id(node) not in known
        ]
        if weights is not None:
            kept = {id(v) for g in model.graphs() for v in g.initializers.values()}
            changes += [Change(name, "Initializer", weights) for key, name in self._weights if key not in kept]
        return changes


def name_missing_nodes(model: ir.Model) -> None:
    """Give nodes without a name one that follows from their first output: readable and the same every time."""
    for node in model.graph.all_nodes():
        if not node.name:
            node.name = f"{node.outputs[0].name}/{node.op_type}" if node.outputs else node.op_type
