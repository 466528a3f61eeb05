"""Half precision on a machine without half kernels: the same graph in FP32, rounded wherever a value would be half.

ONNX Runtime on a CPU has no BF16 kernels at all. It runs an FP16 model, but where it lacks an FP16 kernel it computes
in FP32 and skips the rounding between two such operators, so that the error it shows is too small: the emulation rounds
at every edge, in both types.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from exporter.precision.facts import is_cast
from exporter.precision.schemas import FLOAT, HalfType, half_type

if TYPE_CHECKING:
    import onnx_ir as ir


def emulate_bf16(path_in: Path | str, path_out: Path | str) -> dict[str, Any]:
    """`emulate_half` for a BF16 model."""
    return emulate_half(path_in, path_out, precision="bf16")


def emulate_half(path_in: Path | str, path_out: Path | str, *, precision: Literal["fp16", "bf16"]) -> dict[str, Any]:
    """Rewrite a half model so that a runtime with FP32 kernels and a cast can run it (ONNX Runtime on a CPU).

    Every operator that computes in half computes in FP32 instead, and each of its results passes a cast to half and
    back before anybody reads it. What stays different from real half kernels is only what happens inside one
    operator (most kernels accumulate in FP32 as well). Constants become FP32 numbers with the same values. Inputs
    and outputs that are half become FP32; inputs are rounded first.

    Args:
        path_in: A model that `exporter.precision.half.convert` made with this precision.
        path_out: Where the emulation goes. It is about twice as large.
        precision: The half type that the model uses.

    Returns:
        ``{"emulation": precision, "how": …, "rounded": edges, "constants": count, "casts_removed": count}``.

    Raises:
        RequestError: The model can't be read, or `precision` is no half type.
        InternalError: The result is not strongly typed.
    """
    import onnx_ir as ir

    from exporter.onnx_files import load_model, save_model
    from exporter.precision.check import check_strongly_typed
    from exporter.precision.half import name_nodes

    half = half_type(precision)
    model = load_model(path_in)
    constants = rounded = removed = 0
    nodes = list(model.graph.all_nodes())
    taken = {v.name for g in model.graphs() for v in (*g.inputs, *g.initializers.values())}
    taken |= {v.name for node in nodes for v in node.outputs}
    for graph in model.graphs():
        for value in graph.initializers.values():
            if _is_half(value, half) and value.const_value is not None:
                value.const_value = _widened(value.const_value, str(value.name))
                value.dtype = ir.DataType.FLOAT
                constants += 1
        for value in graph.inputs:
            if _is_half(value, half):
                value.dtype = ir.DataType.FLOAT
                _round(value, graph, taken, half)
                rounded += 1
    for node in nodes:
        assert node.graph is not None
        before = [_is_half(value, half) for value in node.outputs]
        _retype_attribute(node, half)
        for value, was_half in zip(list(node.outputs), before, strict=True):
            if was_half:
                value.dtype = ir.DataType.FLOAT
                _round(value, node.graph, taken, half)
                rounded += 1
    for node in nodes:
        source, output = (node.inputs[0], node.outputs[0]) if is_cast(node) else (None, None)
        # A cast between half and FP32 is now one from FP32 to FP32: the rounding behind its input or output is all
        # that it was.
        if source is None or output is None or source.dtype != output.dtype or output.is_graph_output():
            continue
        output.replace_all_uses_with(source)
        if node.graph is not None:
            node.graph.remove(node, safe=True)
            removed += 1
    name_nodes(model)
    check_strongly_typed(model)
    save_model(model, path_out, external_data=True)  # streamed: a file in one piece is held several times in memory
    return {
        "emulation": half.name,
        "how": f"FP32 kernels; every value that is {half.name} in the model passes a cast to {half.name} and back",
        "rounded": rounded,
        "constants": constants,
        "casts_removed": removed,
    }


def _is_half(value: ir.Value, half: HalfType) -> bool:
    return value.dtype is not None and int(value.dtype) == half.onnx_type


def _widened(tensor: ir.TensorProtocol, name: str) -> ir.LazyTensor:
    import onnx_ir as ir

    def widened() -> ir.Tensor:
        return ir.Tensor(tensor.numpy().astype(np.float32), name=name)

    return ir.LazyTensor(widened, dtype=ir.DataType.FLOAT, shape=ir.Shape(tensor.shape), name=name)


def _retype_attribute(node: ir.Node, half: HalfType) -> None:
    """Attributes that say "half" say "FP32"."""
    import onnx_ir as ir

    for name, attribute in list(node.attributes.items()):
        if name in ("to", "dtype", "output_dtype", "output_datatype", "softmax_precision"):
            if attribute.type == ir.AttributeType.INT and attribute.value == half.onnx_type:
                node.attributes[name] = ir.AttrInt64(name, FLOAT)
        elif attribute.type == ir.AttributeType.TENSOR and int(attribute.as_tensor().dtype) == half.onnx_type:
            wide = ir.Tensor(attribute.as_tensor().numpy().astype(np.float32), name=name)
            node.attributes[name] = ir.AttrTensor(name, wide)


def _round(value: ir.Value, graph: ir.Graph, taken: set[str | None], half: HalfType) -> None:
    """Let every reader of `value`, and the graph's output where it is one, see it rounded."""
    import onnx_ir as ir

    down = ir.node("Cast", [value], {"to": half.onnx_type})
    up = ir.node("Cast", [down.outputs[0]], {"to": FLOAT})
    for node, suffix, onnx_type in ((down, half.name, half.onnx_type), (up, "rounded", FLOAT)):
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
