"""Dynamic int8 for ONNX Runtime: activations are quantized as they come, by the range of the very batch.

Standard ONNX operators only (`DynamicQuantizeLinear`, `MatMulInteger`), written in the shape that ONNX Runtime fuses
into its kernels. An activation that several products read is quantized once.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.quantize.products import Kept, products, refuse_nothing, refuse_unknown, save_quantized
from calibration.quantize.tables import quantize_tables
from calibration.quantize.weights import quantize_weight

if TYPE_CHECKING:
    import onnx_ir as ir


def quantize_dynamic(
    path_in: Path,
    path_out: Path,
    *,
    per_channel: bool = True,
    tables: bool = True,
    keep: Collection[str] = (),
    external_data: bool | None = None,
) -> dict[str, Any]:
    """Quantize the products with constant weights; no calibration is needed.

    Args:
        path_in: The FP32 graph.
        path_out: Where the quantized graph goes.
        per_channel: A step per output channel of a weight; else one for the whole weight.
        tables: Store large embedding tables as int8 too (`calibration.quantize.tables`).
        keep: Names of nodes that stay in FP32.
        external_data: As `exporter.onnx_files.save_model` has it.

    Returns:
        The record: ``quantized`` (node, weight error), ``tables`` and ``kept`` (and why).

    Raises:
        RequestError: Nothing could be quantized, or `keep` names no node of the graph.
    """
    from exporter.onnx_files import load_model
    from exporter.passes.graphs import infer_missing

    model = load_model(path_in)
    infer_missing(model)
    refuse_unknown(model, keep)
    kept: list[Kept] = []
    quantized: list[dict[str, Any]] = []
    made: dict[int, tuple[ir.Value, ...]] = {}
    for node in products(model, attention=False):
        name = str(node.name)
        if name in keep:
            kept.append(Kept(name, node.op_type, "asked", "asked for by name"))
        elif node.op_type != "MatMul":
            kept.append(Kept(name, node.op_type, "no_dynamic_form", "only MatMul is quantized dynamically"))
        else:
            error = _quantize(model, node, made, per_channel)
            quantized.append({"node": name, "op": node.op_type, "weight_rms_relative": error})
    refuse_nothing(quantized, kept, path_in)
    stored, floats = quantize_tables(model, keep=keep) if tables else ([], [])
    save_quantized(model, path_out, external_data)
    return {
        "form": "dynamic",
        "per_channel": per_channel,
        "quantized": quantized,
        "tables": stored,
        "kept": [asdict(entry) for entry in (*kept, *floats)],
    }


def _quantize(model: ir.Model, node: ir.Node, made: dict[int, tuple[ir.Value, ...]], per_channel: bool) -> float:
    """Replace a product by its integer form; returns the RMS relative error of the weight's rounding."""
    import onnx_ir as ir

    from exporter.passes.graphs import add_constant, replace_value

    activation, weight = node.inputs[0], node.inputs[1]
    assert activation is not None
    assert weight is not None
    assert weight.const_value is not None
    graph = model.graph
    rounded = quantize_weight(weight.const_value.numpy(), 1 if per_channel else None)
    if id(activation) not in made:
        dynamic = ir.node("DynamicQuantizeLinear", [activation], num_outputs=3, name=f"{activation.name}_dynamic")
        for output, kind, dtype, shape in zip(
            dynamic.outputs,
            ("quantized", "scale", "zero_point"),
            (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8),
            (activation.shape, ir.Shape([]), ir.Shape([])),
            strict=True,
        ):
            output.name, output.dtype, output.shape = f"{activation.name}_{kind}", dtype, shape
        graph.insert_before(node, dynamic)
        made[id(activation)] = tuple(dynamic.outputs)
    integers, scale, zero = made[id(activation)]
    values = add_constant(graph, rounded.values, f"{weight.name}_quantized")
    zeros = add_constant(graph, np.zeros(rounded.scales.shape, np.int8), f"{weight.name}_zero_point")
    scales = add_constant(graph, rounded.scales, f"{weight.name}_scale")
    output = node.outputs[0]

    def step(op_type: str, inputs: list[Any], suffix: str, dtype: ir.DataType, **attributes: Any) -> ir.Value:
        made_node = ir.node(op_type, inputs, attributes=attributes, name=f"{node.name}_{suffix}")
        graph.insert_before(node, made_node)
        value = made_node.outputs[0]
        value.name, value.dtype = f"{output.name}_{suffix}", dtype
        if suffix != "scale":
            value.shape = None if output.shape is None else output.shape.copy()
        return value

    summed = step("MatMulInteger", [integers, values, zero, zeros], "int32", ir.DataType.INT32)
    wide = step("Cast", [summed], "float", ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
    both = step("Mul", [scale, scales], "scale", ir.DataType.FLOAT)
    result = step("Mul", [wide, both], "restored", ir.DataType.FLOAT)
    replace_value(output, result)
    graph.remove(node, safe=True)
    return rounded.rms_relative
