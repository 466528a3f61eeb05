"""Packed projections apart: query, key and value out of one product become a product each, for TensorRT.

Its compiler takes such a product apart itself, by slices of the weights. With a scale per channel it loses the pair
on the way: TensorRT for RTX 1.7 then restores integers at run time and multiplies in FP32. Products that are written
apart are taken as integers, and fused into one again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir


def write_apart(model: ir.Model, nodes: Sequence[ir.Node]) -> list[str]:
    """Write quantized products apart where what reads them takes their channels apart; the numbers are the same.

    Args:
        model: Changed in place.
        nodes: Products whose weights are behind a `DequantizeLinear`.

    Returns:
        Names of the nodes that were written apart.
    """
    return [str(node.name) for node in nodes if (count := _parts(node)) > 1 and _write(model, node, count)]


def _write(model: ir.Model, node: ir.Node, count: int) -> bool:
    from exporter.passes.graphs import add_constant, add_node, producer, replace_value

    weight = producer(node.inputs[1], "DequantizeLinear")
    stored = [] if weight is None else [value.const_value for value in weight.inputs if value is not None]
    if weight is None or len(stored) != 3 or any(tensor is None for tensor in stored):
        return False
    axes = (1, 0, 0)  # of numbers, scales and zero points
    outputs = []
    for number in range(count):
        inputs: list[ir.Value | None] = []
        for value, tensor, axis in zip(weight.inputs, stored, axes, strict=True):
            assert value is not None
            assert tensor is not None
            part = np.split(tensor.numpy(), count, axis=axis)[number]
            inputs.append(add_constant(model.graph, part, f"{value.name}_part{number}"))
        restored = add_node(node, "DequantizeLinear", inputs, axis=1)
        restored.dtype = node.inputs[1].dtype if node.inputs[1] is not None else None
        output = add_node(node, "MatMul", [node.inputs[0], restored])
        maker = output.producer()
        assert maker is not None
        maker.name = f"{node.name}_part{number}"
        outputs.append(output)
    joined = add_node(node, "Concat", [*outputs], like=node.outputs[0], axis=-1)
    return replace_value(node.outputs[0], joined)


def _parts(node: ir.Node) -> int:
    """How many equal runs of channels are read apart: behind a reshape that gives them an axis of their own.

    `MatMul → [Add] → Reshape (…, parts, heads, size) → [Transpose] → Slice, Split or Gather of that axis`.
    """
    from exporter.passes.graphs import integers

    if node.op_type != "MatMul" or node.inputs[1] is None or node.inputs[1].shape is None:
        return 1
    channels = node.inputs[1].shape[-1]
    reader = _reader(node.outputs[0])
    if reader is not None and reader.op_type == "Add":
        reader = _reader(reader.outputs[0])
    if reader is None or reader.op_type != "Reshape" or not isinstance(channels, int):
        return 1
    dims = integers(reader.inputs[1]) or []
    axis, product = len(dims), 1
    while axis and product < channels and dims[axis - 1] > 0:
        axis -= 1
        product *= dims[axis]
    if product != channels or axis == len(dims):
        return 1
    count, value = dims[axis], reader.outputs[0]
    through = _reader(value)
    if through is not None and through.op_type == "Transpose" and "perm" in through.attributes:
        axis, value = list(through.attributes["perm"].as_ints()).index(axis), through.outputs[0]
    apart = [_axis(user, len(dims)) == axis for user, _ in value.uses()]
    return count if apart and all(apart) else 1


def _reader(value: ir.Value) -> ir.Node | None:
    """The only node that reads a value."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _axis(node: ir.Node, rank: int) -> int | None:
    """The one axis along which a node takes a part of its input, from 0."""
    from exporter.passes.graphs import integers

    if node.op_type in ("Split", "Gather"):
        return node.attributes.get_int("axis", 0) % rank
    if node.op_type == "Slice" and len(node.inputs) > 3:
        axes = integers(node.inputs[3])
        return axes[0] % rank if axes is not None and len(axes) == 1 else None
    return None
