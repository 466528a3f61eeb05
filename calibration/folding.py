"""Dividing a tensor of a graph per channel: by the constants that make it where only some nodes read it, else by an
operator of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.quantize.products import output_axis

if TYPE_CHECKING:
    import onnx_ir as ir

Array = np.ndarray


@dataclass(frozen=True)
class Makers:
    """The constants that divide a tensor when they are divided.

    Attributes:
        nodes: What reads each constant, and as which input; empty where there are none.
        why: Why there are none.
    """

    nodes: tuple[tuple[ir.Node, int], ...] = ()
    why: str = ""


def makers(value: ir.Value, readers: Sequence[ir.Node], channels: int) -> Makers:
    """Which constants make a tensor that only `readers` read.

    They are a norm's scale and shift, a constant factor of a `Mul`, the weights and the bias of a product, and, where
    an `Add` has a constant, that and what makes its other side. A `Relu` commutes with positive factors, and the
    weighting of attention's values with any: what makes the values takes the division of what its heads give.

    Args:
        value: The tensor.
        readers: The nodes that take the division into account, by their first input.
        channels: Length of its last axis.
    """
    if value.is_graph_output():
        return Makers(why=f"{value.name!r} is an output of the graph")
    for use in value.uses():
        if use.node not in readers or use.idx != 0:
            return Makers(why=f"{use.node.name!r} ({use.node.op_type}) reads {value.name!r} too")
    return _makers_of(value, channels)


def _makers_of(value: ir.Value, channels: int) -> Makers:
    node = value.producer()
    if node is None:
        return Makers(why=f"{value.name!r} is an input of the graph")
    constant = [_is_constant(inner) for inner in node.inputs]
    op_type = node.op_type if node.domain == "" else f"{node.domain}.{node.op_type}"
    if op_type in ("LayerNormalization", "RMSNormalization") and all(constant[1:]):
        return Makers(tuple((node, index) for index, inner in enumerate(node.inputs) if index and inner is not None))
    if op_type == "Mul" and any(constant):
        return Makers(((node, constant.index(True)),))
    if op_type == "MatMul" and constant[1] and _matrix(node.inputs[1]):
        return Makers(((node, 1),))
    if op_type == "Gemm" and all(constant[1:]):
        return Makers(tuple((node, index) for index, inner in enumerate(node.inputs) if index and inner is not None))
    if op_type == "Add" and any(constant):
        found = _before(node, 1 - constant.index(True), channels)
        return Makers((*found.nodes, (node, constant.index(True)))) if found.nodes else found
    if op_type == "Relu":
        return _before(node, 0, channels)
    if op_type == "Reshape" and (split := _values_of_heads(node, channels)) is not None:
        return _before(split, 0, channels)
    return Makers(why=f"no constants of {node.name!r} ({op_type}) make {value.name!r}")


def _before(node: ir.Node, index: int, channels: int) -> Makers:
    """The makers of what a node reads, if it alone reads that."""
    inner = node.inputs[index]
    if inner is None or inner.shape is None or not len(inner.shape) or inner.shape[-1] != channels:
        return Makers(why=f"what {node.name!r} ({node.op_type}) reads has other channels")
    if inner.is_graph_output() or len(list(inner.uses())) != 1:
        return Makers(why=f"not only {node.name!r} ({node.op_type}) reads {inner.name!r}")
    return _makers_of(inner, channels)


def _values_of_heads(merge: ir.Node, channels: int) -> ir.Node | None:
    """Where `merge` puts attention's heads together: the `Reshape` that took the values apart; else ``None``.

    ``values (…, channels) -> Reshape -> Transpose -> MatMul (anything, …) -> Transpose -> Reshape``: a channel
    goes through as a column of its head, in the same order at both ends, and nothing else reads what lies between.
    """
    swap = _only_reader(merge, 0, "Transpose")
    product = None if swap is None else _only_reader(swap, 0, "MatMul")
    apart = None if product is None else _only_reader(product, 1, "Transpose")
    split = None if apart is None else _only_reader(apart, 0, "Reshape")
    if swap is None or apart is None or split is None or product is None:
        return None
    before, after = _heads(split.outputs[0]), _heads(swap.outputs[0])
    if before is None or before != after or before[0] * before[1] != channels:
        return None
    values = product.inputs[1]
    if values is None or values.shape is None or values.shape[1] != before[0]:
        return None
    return split if _swaps_heads(swap) and _swaps_heads(apart) else None


def _only_reader(node: ir.Node, index: int, op_type: str) -> ir.Node | None:
    """The node of a type that makes an input of `node`, if `node` alone reads that."""
    value = node.inputs[index]
    made = None if value is None else value.producer()
    if value is None or made is None or made.op_type != op_type or made.domain != "":
        return None
    return None if value.is_graph_output() or len(list(value.uses())) != 1 else made


def _heads(value: ir.Value) -> tuple[int, int] | None:
    """The last two lengths of a tensor of four axes, (heads, columns), where both are fixed."""
    if value.shape is None or len(value.shape) != 4:
        return None
    heads, columns = value.shape[2], value.shape[3]
    return (heads, columns) if isinstance(heads, int) and isinstance(columns, int) else None


def _swaps_heads(node: ir.Node) -> bool:
    order = node.attributes.get("perm")
    return order is not None and list(order.as_ints()) == [0, 2, 1, 3]


def _is_constant(value: ir.Value | None) -> bool:
    """A constant, or an input that was left out."""
    if value is None:
        return True
    tensor = value.const_value
    return tensor is not None and not value.is_graph_input() and tensor.dtype.numpy() == np.float32


def _matrix(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and len(value.const_value.shape) == 2


def divide(
    model: ir.Model, value: ir.Value, readers: Sequence[ir.Node], found: Makers, factors: Array
) -> dict[str, Any]:
    """Divide what `readers` read by `factors`, (channels,); the record of how."""
    from exporter.passes.graphs import add_constant, add_node

    if found.nodes:
        for node, index in found.nodes:
            old = node.inputs[index]
            assert old is not None
            assert old.const_value is not None
            rows = node.op_type == "Gemm" and index == 1 and output_axis(node) == 0
            array = old.const_value.numpy() / (factors[:, None] if rows else factors)
            node.replace_input_with(index, add_constant(model.graph, array, f"{old.name}_smooth"))
        names = [str(node.name) for node, _ in found.nodes]
        return {"activation": str(value.name), "how": "folded", "into": list(dict.fromkeys(names))}
    inverse = add_constant(model.graph, (1 / factors.astype(np.float64)).astype(np.float32), f"{value.name}_inverse")
    divided = add_node(readers[0], "Mul", [value, inverse], like=value)
    divided.name = f"{value.name}_smooth"
    made_by = divided.producer()
    assert made_by is not None
    made_by.name = f"{readers[0].name}_smooth"
    for node in readers:
        node.replace_input_with(0, divided)
    return {"activation": str(value.name), "how": "inserted", "why": found.why}
