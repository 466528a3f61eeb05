"""Weights alone as integers, for ONNX Runtime: `MatMulNBits` reads 4 or 8 bits a weight, and takes and gives FP32.

It pays where reading weights is what takes the time: few tokens at once, large matrices. A weight that several products
read is stored once.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.quantize.blocks import BlockWeight, quantize_blocks
from calibration.quantize.products import Kept, products, refuse_nothing, refuse_unknown, save_quantized, weight_of

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "com.microsoft"
ACCURACY_LEVEL = 4
"""How `MatMulNBits` computes: 4 rounds activations to int8 inside, a step per block; 1 restores the weights to FP32."""


def quantize_weight_only(
    path_in: Path,
    path_out: Path,
    *,
    bits: int,
    block_size: int = 32,
    symmetric: bool = False,
    accuracy_level: int = ACCURACY_LEVEL,
    keep: Collection[str] = (),
    external_data: bool | None = None,
) -> dict[str, Any]:
    """Store the constant weights of products as integers; no calibration is needed.

    Args:
        path_in: The FP32 graph.
        path_out: Where the quantized graph goes; ONNX Runtime alone reads it.
        bits: 4 or 8 per weight.
        block_size: Weights that share a scale, along the axis that is summed: a power of two, 16 or more.
        symmetric: 0 is the middle integer everywhere; else each block has the one that suits it.
        accuracy_level: See `ACCURACY_LEVEL`.
        keep: Names of nodes that stay in FP32.
        external_data: As `exporter.onnx_files.save_model` has it.

    Returns:
        The record: ``quantized`` (node, weight error) and ``kept`` (and why).

    Raises:
        RequestError: No such bits or block size, or `keep` names no node of the graph.
        NotApplicableError: Nothing could be quantized.
    """
    from exporter.onnx_files import load_model
    from exporter.passes.graphs import infer_missing

    model = load_model(path_in)
    infer_missing(model)
    refuse_unknown(model, keep)
    kept: list[Kept] = []
    quantized: list[dict[str, Any]] = []
    made: dict[tuple[int, bool], tuple[BlockWeight, list[ir.Value]]] = {}
    for node in products(model, attention=False):
        name = str(node.name)
        if name in keep:
            kept.append(Kept(name, node.op_type, "asked", "asked for by name"))
        elif why := _unfit(node):
            kept.append(Kept(name, node.op_type, "no_weight_only_form", why))
        else:
            weight, stored = _store(model.graph, node, made, bits, block_size, symmetric)
            _replace(model.graph, node, weight, stored, accuracy_level)
            quantized.append({"node": name, "op": node.op_type, "weight_rms_relative": weight.rms_relative})
    refuse_nothing(quantized, kept, path_in)
    model.graph.opset_imports.setdefault(DOMAIN, 1)
    save_quantized(model, path_out, external_data)
    return {
        "form": "weights",
        "bits": bits,
        "block_size": block_size,
        "symmetric": symmetric,
        "accuracy_level": accuracy_level,
        "quantized": quantized,
        "kept": [asdict(entry) for entry in kept],
    }


def _unfit(node: ir.Node) -> str:
    """Why `MatMulNBits` cannot stand in for a product; empty where it can."""
    activation, weight = node.inputs[0], weight_of(node)
    assert activation is not None
    assert weight is not None
    assert weight.const_value is not None
    if node.op_type == "Conv":
        return "only MatMul and Gemm can have their weights alone quantized"
    if activation.shape is not None and len(activation.shape) < 2:
        return "it multiplies a vector"
    attributes = node.attributes
    if attributes.get_int("transA", 0) or any(attributes.get_float(name, 1.0) != 1 for name in ("alpha", "beta")):
        return "it scales or transposes what it multiplies"
    array = weight.const_value.numpy()
    return "" if array.size and np.isfinite(array).all() else "its weight is empty, or not all of it is finite"


def _store(
    graph: ir.Graph,
    node: ir.Node,
    made: dict[tuple[int, bool], tuple[BlockWeight, list[ir.Value]]],
    bits: int,
    block_size: int,
    symmetric: bool,
) -> tuple[BlockWeight, list[ir.Value]]:
    """The weight of a product as integers, and the initializers that hold it: stored once for all its readers."""
    from exporter.passes.graphs import add_constant

    weight = node.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    key = id(weight), bool(node.attributes.get_int("transB", 0))
    if key not in made:
        array = weight.const_value.numpy()
        rounded = quantize_blocks(array.T if key[1] else array, bits, block_size, symmetric=symmetric)
        parts = {f"int{bits}": rounded.packed, "scales": rounded.scales, "zero_points": rounded.zeros}
        stored = [add_constant(graph, part, f"{weight.name}_{n}") for n, part in parts.items() if part is not None]
        made[key] = rounded, stored
    return made[key]


def _replace(graph: ir.Graph, node: ir.Node, weight: BlockWeight, stored: list[ir.Value], accuracy_level: int) -> None:
    from exporter.passes.graphs import add_node, replace_value

    output = node.outputs[0]

    def step(op_type: str, inputs: list[ir.Value | None], **attributes: Any) -> ir.Value:
        value = add_node(node, op_type, inputs, like=output, **attributes)
        made = value.producer()
        assert made is not None
        made.name, value.name = f"{node.name}_{op_type}", f"{output.name}_{op_type}"
        return value

    result = step(
        "MatMulNBits",
        [node.inputs[0], *stored],
        domain=DOMAIN,
        K=weight.rows,
        N=int(weight.packed.shape[0]),
        bits=weight.bits,
        block_size=weight.block_size,
        accuracy_level=accuracy_level,
    )
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        result = step("Add", [result, node.inputs[2]])
    replace_value(output, result)
    graph.remove(node, safe=True)
