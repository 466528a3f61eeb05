"""BF16 on a machine without BF16 kernels: the same graph in FP32, rounded to BF16 wherever a value would be BF16."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.precision.facts import is_cast
from exporter.precision.schemas import FLOAT, HALF_TYPES

if TYPE_CHECKING:
    import onnx_ir as ir

BF16 = HALF_TYPES["bf16"].onnx_type


def emulate_bf16(path_in: Path | str, path_out: Path | str) -> dict[str, Any]:
    """Rewrite a BF16 model so that a runtime with FP32 kernels and a BF16 cast can run it (ONNX Runtime on a CPU).

    Every operator that computes in BF16 computes in FP32 instead, and each of its results passes a cast to BF16 and
    back before anybody reads it. What stays different from real BF16 kernels is only what happens inside one
    operator (kernels accumulate in FP32 as well). Constants become FP32 numbers with the same values. Inputs and
    outputs that are BF16 become FP32; inputs are rounded first.

    Args:
        path_in: A model that `exporter.precision.half.convert` made with ``precision="bf16"``.
        path_out: Where the emulation goes. It is about twice as large.

    Returns:
        ``{"emulation": "bf16", "how": …, "rounded": edges, "constants": count, "casts_removed": count}``.

    Raises:
        InternalError: The result is not strongly typed.
    """
    import onnx_ir as ir

    from exporter.onnx_files import load_model, save_model
    from exporter.precision.check import check_strongly_typed
    from exporter.precision.half import name_nodes

    model = load_model(path_in)
    constants = rounded = removed = 0
    nodes = list(model.graph.all_nodes())
    taken = {v.name for g in model.graphs() for v in (*g.inputs, *g.initializers.values())}
    taken |= {v.name for node in nodes for v in node.outputs}
    for graph in model.graphs():
        for value in graph.initializers.values():
            if _is_bf16(value) and value.const_value is not None:
                value.const_value = _widened(value.const_value, str(value.name))
                value.dtype = ir.DataType.FLOAT
                constants += 1
        for value in graph.inputs:
            if _is_bf16(value):
                value.dtype = ir.DataType.FLOAT
                _round(value, graph, taken)
                rounded += 1
    for node in nodes:
        assert node.graph is not None
        before = [_is_bf16(value) for value in node.outputs]
        _retype_attribute(node)
        for value, was_bf16 in zip(list(node.outputs), before, strict=True):
            if was_bf16:
                value.dtype = ir.DataType.FLOAT
                _round(value, node.graph, taken)
                rounded += 1
    for node in nodes:
        source, output = (node.inputs[0], node.outputs[0]) if is_cast(node) else (None, None)
        # A cast between BF16 and FP32 is now one from FP32 to FP32: the rounding behind its input or output is all
        # that it was.
        if source is None or output is None or source.dtype != output.dtype or output.is_graph_output():
            continue
        output.replace_all_uses_with(source)
        if node.graph is not None:
            node.graph.remove(node, safe=True)
            removed += 1
    name_nodes(model)
    check_strongly_typed(model)
    save_model(model, path_out)
    return {
        "emulation": "bf16",
        "how": "FP32 kernels; every value that is BF16 in the model passes a cast to BF16 and back",
        "rounded": rounded,
        "constants": constants,
        "casts_removed": removed,
    }


def _is_bf16(value: ir.Value) -> bool:
    return value.dtype is not None and int(value.dtype) == BF16


def _widened(tensor: ir.TensorProtocol, name: str) -> ir.LazyTensor:
    import onnx_ir as ir

    def widened() -> ir.Tensor:
        return ir.Tensor(tensor.numpy().astype(np.float32), name=name)

    return ir.LazyTensor(widened, dtype=ir.DataType.FLOAT, shape=ir.Shape(tensor.shape), name=name)


def _retype_attribute(node: ir.Node) -> None:
    """Attributes that say "BF16" say "FP32"."""
    import onnx_ir as ir

    for name, attribute in list(node.attributes.items()):
        if name in ("to", "dtype", "output_dtype", "output_datatype", "softmax_precision"):
            if attribute.type == ir.AttributeType.INT and attribute.value == BF16:
                node.attributes[name] = ir.AttrInt64(name, FLOAT)
        elif attribute.type == ir.AttributeType.TENSOR and int(attribute.as_tensor().dtype) == BF16:
            wide = ir.Tensor(attribute.as_tensor().numpy().astype(np.float32), name=name)
            node.attributes[name] = ir.AttrTensor(name, wide)


def _round(value: ir.Value, graph: ir.Graph, taken: set[str | None]) -> None:
    """Let every reader of `value`, and the graph's output where it is one, see it rounded to BF16."""
    import onnx_ir as ir

    down = ir.node("Cast", [value], {"to": BF16})
    up = ir.node("Cast", [down.outputs[0]], {"to": FLOAT})
    for node, suffix, onnx_type in ((down, "bf16", BF16), (up, "rounded", FLOAT)):
        output = node.outputs[0]
        name = f"{value.name}_{suffix}"
        while name in taken:
            name += "_"
        taken.add(name)
        output.name, output.shape, output.dtype = name, value.shape, ir.DataType(onnx_type)
        node.name = f"{name}/Cast"
    for use in value.uses():
        if use.node is not down:
            use.node.replace_input_with(use.idx, up.outputs[0])
    outputs = [index for index, output in enumerate(graph.outputs) if output is value]
    for index in outputs:
        graph.outputs[index] = up.outputs[0]
    if outputs:
        value.name, up.outputs[0].name = up.outputs[0].name, value.name
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, [down, up])
    else:
        graph.insert_before(graph[0], [down, up])
