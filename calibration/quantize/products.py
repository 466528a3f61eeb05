"""The products of a graph: the nodes that quantization is about, and the tensors that they read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from exporter.errors import RequestError

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Kept:
    """A product that stays in FP32, and why."""

    node: str
    op: str
    rule: str
    why: str


def products(model: ir.Model, *, attention: bool = True) -> list[ir.Node]:
    """The products that a Q/DQ form may quantize, in graph order: `MatMul` and `Gemm` with constant weights of two
    dimensions, and (with `attention`) `MatMul` of two activations."""
    found = []
    for node in model.graph:
        if node.domain != "" or node.op_type not in ("MatMul", "Gemm") or len(node.inputs) < 2:
            continue
        weight = node.inputs[1]
        if is_weight(weight) or (attention and node.op_type == "MatMul" and is_activation(weight)):
            found.append(node)
    return found


def observed(model: ir.Model, *, attention: bool = True) -> list[str]:
    """Names of the tensors that calibration has to look at for these products, in graph order."""
    names: dict[str, None] = {}
    for node in products(model, attention=attention):
        for value in node.inputs[:2]:
            if is_activation(value) and value is not None:
                names[str(value.name)] = None
    return list(names)


def is_weight(value: ir.Value | None) -> bool:
    """A constant float matrix."""
    tensor = None if value is None else value.const_value
    return tensor is not None and len(tensor.shape) == 2 and tensor.dtype.numpy() == np.float32


def is_activation(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is None


def refuse_nothing(quantized: Sequence[object], kept: Sequence[Kept], path: Path) -> None:
    """Refuse a form in which no product is quantized: it would be the FP32 graph under another name.

    Raises:
        RequestError: Says why the first product was kept.
    """
    if not quantized:
        why = f"{kept[0].node}: {kept[0].why}" if kept else "it has no matrix product with constant weights"
        raise RequestError("nothing in the graph can be quantized", f"{path.name}: {why}", "Leave int8 out")


def refuse_unknown(model: ir.Model, keep: Iterable[str]) -> None:
    """Refuse names of nodes that are not there.

    Raises:
        RequestError: Names the first.
    """
    if unknown := sorted(set(keep) - {str(node.name) for node in model.graph}):
        raise RequestError("a node to keep in FP32 is not in the graph", unknown[0], "Name nodes of this graph")
