"""Everything once: equal weights, weights that are another's transpose, and equal computations."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.errors import InternalError
from exporter.passes.base import Change, Pass, PassContext, PassRecord
from exporter.passes.graphs import Diff, add_node, remove_dead

if TYPE_CHECKING:
    import onnx_ir as ir

_CHUNK_BYTES = 16 << 20
_TRANSPOSE_MIN_BYTES = 1 << 20
"""A transposed twin is worth an operator only where it saves at least this much in the file."""


class Deduplicate(Pass):
    """Store equal initializers once and compute equal expressions once.

    Weights are compared by a hash over pieces of the memory-mapped file, so the pass needs no second copy of them. A
    large matrix that is the transpose of another (a tied embedding, as PyTorch's exporter folds it into the output
    projection) becomes a `Transpose` of the one that is kept; runtimes fold it when they load the model.
    """

    name = "dedupe"
    why = "equal weights are stored once and equal expressions are computed once"

    def apply(self, model: ir.Model, context: PassContext) -> PassRecord:
        from onnx_ir.passes import common

        changes = _merge_equal_initializers(model.graph) + _tie_transposed(model.graph)
        diff = Diff(model)
        common.CommonSubexpressionEliminationPass()(model)
        remove_dead(model)
        return self.record(
            changes + diff.changes(model, "computes what another node computes", "keeps an output's name")
        )

    def ensures(self, model: ir.Model, context: PassContext) -> None:
        tensors = [
            v.const_value for v in model.graph.initializers.values() if v.const_value is not None and _is_free(v)
        ]
        small = [(t.dtype, tuple(t.shape.numpy()), _digest(t)) for t in tensors if 0 < t.nbytes <= _CHUNK_BYTES >> 8]
        if len(small) != len(set(small)):
            raise InternalError("equal initializers are left", len(small) - len(set(small)))


def _merge_equal_initializers(graph: ir.Graph) -> list[Change]:
    changes: list[Change] = []
    first: dict[tuple[Any, ...], ir.Value] = {}
    # Only tensors that agree in type and shape can be equal: most weights need no hash at all.
    groups: dict[tuple[Any, ...], list[ir.Value]] = {}
    for value in graph.initializers.values():
        if value.const_value is not None and _is_free(value):
            groups.setdefault((value.const_value.dtype, tuple(value.const_value.shape.numpy())), []).append(value)
    for key, values in groups.items():
        if len(values) < 2:
            continue
        for value in values:
            kept = first.setdefault((*key, _digest(value.const_value)), value)
            if kept is value:
                continue
            value.replace_all_uses_with(kept)
            graph.initializers.pop(value.name or "")
            changes.append(Change(value.name or "", "Initializer", f"equal to {kept.name}"))
    return changes


def _tie_transposed(graph: ir.Graph) -> list[Change]:
    changes: list[Change] = []
    matrices: dict[tuple[Any, ...], list[ir.Value]] = {}
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or not _is_free(value):
            continue
        shape = tuple(int(d) for d in tensor.shape.numpy())
        if len(shape) != 2 or tensor.nbytes < _TRANSPOSE_MIN_BYTES or min(shape) < 2:
            continue
        twin = next((v for v in matrices.get((tensor.dtype, shape[::-1]), ()) if _is_transpose(v, value)), None)
        # The one that the embedding gathers rows from is kept as it is: a runtime folds the other at load time.
        kept, gone = (twin, value) if not _is_gathered(value) else (value, twin)
        readers = [] if gone is None else [user for user, _ in gone.uses()]
        if kept is None or gone is None or not readers or any(user.graph is not graph for user in readers):
            matrices.setdefault((tensor.dtype, shape), []).append(value)
            continue
        order = {id(node): index for index, node in enumerate(graph)}
        earliest = min(readers, key=lambda node: order[id(node)])
        transposed = add_node(earliest, "Transpose", [kept], gone, perm=[1, 0])
        name = gone.name or "weight"
        gone.replace_all_uses_with(transposed)
        graph.initializers.pop(name)
        transposed.name = f"{name}_tied"
        changes.append(Change(name, "Initializer", f"the transpose of {kept.name}"))
        if kept is value:
            matrices[(tensor.dtype, shape[::-1])].remove(twin)
            matrices.setdefault((tensor.dtype, shape), []).append(value)
    return changes


def _is_free(value: ir.Value) -> bool:
    """Whether an initializer may go: no caller knows it by its name, as an input or as an output."""
    return not value.is_graph_input() and not value.is_graph_output()


def _is_gathered(value: ir.Value) -> bool:
    return any(user.op_type == "Gather" and index == 0 for user, index in value.uses())


def _is_transpose(first: ir.Value, second: ir.Value) -> bool:
    if first.const_value is None or second.const_value is None:
        return False
    a, b = first.const_value.numpy(), second.const_value.numpy()
    rows = max(1, _CHUNK_BYTES // max(1, a[:1].nbytes))
    if not _same_bits(a[:1], b[:, :1].T):
        return False
    return all(_same_bits(a[i : i + rows], b[:, i : i + rows].T) for i in range(0, a.shape[0], rows))


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


def _digest(tensor: Any) -> str:
    """SHA-256 of a tensor's bytes, read in pieces; works for types that NumPy has no buffers for, too."""
    import onnx_ir as ir

    digest = hashlib.sha256()
    if tensor.dtype == ir.DataType.STRING:
        for item in tensor.string_data():
            digest.update(len(item).to_bytes(8, "little") + item)
        return digest.hexdigest()
    flat = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
    for start in range(0, flat.size, _CHUNK_BYTES):
        digest.update(flat[start : start + _CHUNK_BYTES].data)
    return digest.hexdigest()
