"""How many elements an operator sums, by its shapes and by what was seen of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import TYPE_CHECKING

from exporter.passes.graphs import reduced_axes
from exporter.precision.facts import Facts

if TYPE_CHECKING:
    import onnx_ir as ir

Dims = Sequence[int | None]


def static_dims(value: ir.Value | None) -> Dims | None:
    """The sizes of a value's axes, ``None`` for a dynamic one; ``None`` where its rank is unknown."""
    shape = value.shape if value is not None else None
    return None if shape is None else [d if isinstance(d, int) else None for d in shape]


def reduction_depth(node: ir.Node, dims: Dims | None = None) -> int | None:
    """How many elements go into each result of a reduction; ``None`` where shapes or axes don't say.

    Args:
        node: One of `exporter.precision.operators.SUMS`.
        dims: The sizes of its input, where they are not those of the graph.
    """
    if node.op_type in ("AveragePool", "LpPool"):
        kernel = node.attributes.get("kernel_shape")
        return None if kernel is None else prod(kernel.as_ints())
    return _depth(node, dims, _reduced)


def normalized_depth(node: ir.Node, dims: Dims | None = None) -> int | None:
    """How many elements go into each variance of a normalization; ``None`` where shapes don't say (as above)."""
    return _depth(node, dims, _normalized)


def softmax_depth(node: ir.Node, dims: Dims | None = None) -> int | None:
    """How many exponentials a softmax sums; ``None`` where shapes don't say (as above)."""
    return _depth(node, dims, lambda node, rank: [node.attributes.get_int("axis", -1) % rank] if rank else None)


def seen_dims(facts: Facts, value: ir.Value | None) -> Dims | None:
    """The largest sizes that data showed; ``None`` where they are not known."""
    found = facts.measured(value)
    return None if found is None else found.shape


def _depth(node: ir.Node, dims: Dims | None, axes_of: Callable[[ir.Node, int], Iterable[int] | None]) -> int | None:
    dims = static_dims(node.inputs[0]) if dims is None else dims
    axes = None if dims is None else axes_of(node, len(dims))
    if axes is None or dims is None:
        return None
    lengths = [dims[axis] for axis in axes]
    return None if any(n is None for n in lengths) else prod(n for n in lengths if n is not None)


def _reduced(node: ir.Node, rank: int) -> Iterable[int] | None:
    if node.op_type.startswith("Global"):
        return range(2, rank)
    if node.op_type in ("DFT", "STFT"):
        return None
    return reduced_axes(node, rank)


def _normalized(node: ir.Node, rank: int) -> Iterable[int] | None:
    if node.op_type in ("LayerNormalization", "RMSNormalization") and rank:
        return range(node.attributes.get_int("axis", -1) % rank, rank)
    # Of a group there are fewer channels than all; its depth is at most this.
    return range(1, rank) if node.op_type in ("GroupNormalization", "InstanceNormalization") else None
