"""The products of a graph: the nodes that quantization is about, and the tensors that they read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from exporter.errors import NotApplicableError, RequestError

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
    """The products that a Q/DQ form may quantize, in graph order: `MatMul`, `Gemm` and `Conv` with constant weights,
    and (with `attention`) `MatMul` of two activations."""
    found = []
    for node in model.graph:
        if node.domain != "" or node.op_type not in ("MatMul", "Gemm", "Conv") or len(node.inputs) < 2:
            continue
        if not is_activation(node.inputs[0]):
            continue
        if weight_of(node) is not None or (attention and node.op_type == "MatMul" and is_activation(node.inputs[1])):
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


def weight_of(node: ir.Node) -> ir.Value | None:
    """The constant float weight of a product: a matrix, for `Conv` a kernel; ``None`` where it has none."""
    value = node.inputs[1]
    tensor = None if value is None else value.const_value
    if tensor is None or tensor.dtype.numpy() != np.float32:
        return None
    return value if (len(tensor.shape) == 2) != (node.op_type == "Conv") else None


def output_axis(node: ir.Node) -> int:
    """The axis of a product's weight along which its output channels lie."""
    transposed = node.attributes.get("transB")
    return 0 if node.op_type == "Conv" or (transposed is not None and transposed.as_int()) else 1


def is_activation(value: ir.Value | None) -> bool:
    """What depends on the model's inputs."""
    return value is not None and value.const_value is None


def refuse_nothing(quantized: Sequence[object], kept: Sequence[Kept], path: Path) -> None:
    """Refuse a form in which no product is quantized: it would be the FP32 graph under another name.

    Raises:
        NotApplicableError: Says why the first product was kept.
    """
    if not quantized:
        why = f"{kept[0].node}: {kept[0].why}" if kept else "it has no matrix product with constant weights"
        raise NotApplicableError("nothing in the graph can be quantized", f"{path.name}: {why}", "Leave this form out")


def refuse_unknown(model: ir.Model, keep: Iterable[str]) -> None:
    """Refuse names of nodes that are not there.

    Raises:
        RequestError: Names the first.
    """
    if unknown := sorted(set(keep) - {str(node.name) for node in model.graph}):
        raise RequestError("a node to keep in FP32 is not in the graph", unknown[0], "Name nodes of this graph")


def save_quantized(model: ir.Model, path: Path, external_data: bool | None) -> None:
    """Write a quantized graph without what nothing reads any more, its float weights above all, and checked."""
    from exporter.onnx_files import save_model, strip_metadata
    from exporter.passes.checks import check_graph
    from exporter.passes.graphs import remove_dead

    remove_dead(model)
    check_graph(model)
    strip_metadata(model)
    save_model(model, path, external_data=external_data)
