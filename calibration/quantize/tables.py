"""Embedding tables as int8: `Gather` reads integers, and only the rows that it takes are restored to floats.

Written as `Gather`, `Cast` and `Mul` by the rows' scales, taken by the same ids. A `DequantizeLinear` of the whole
table says the same, but OpenVINO folds it into floats when it opens the file, and ONNX Runtime restores all rows in
every run.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.quantize.products import Kept, is_activation
from calibration.quantize.weights import QuantizedWeight, quantize_weight

if TYPE_CHECKING:
    import onnx_ir as ir

Array = np.ndarray

SMALLEST_BYTES, SMALLEST_SHARE, FEWEST_COLUMNS = 1 << 20, 0.05, 16
"""Tables below this size, below this share of the graph's weights, or with fewer values to share a scale stay in FP32:
they make no file small, and are often no embeddings, but angles of positions."""
_CHUNK_BYTES = 64 << 20


def quantize_tables(model: ir.Model, *, keep: Collection[str] = ()) -> tuple[list[dict[str, Any]], list[Kept]]:
    """Store the large embedding tables of a graph as int8, symmetric, with a step per row.

    Call it when the products are quantized: a table that a product has read too is then read by its `Gather` alone, and
    the integers of both are stored once where they are the same.

    Args:
        model: Changed in place. A table is a float32 initializer (rows, columns), large enough (`SMALLEST_BYTES` and
            what is beside it), that a `Gather` along axis 0 reads by ids that the model is given or computes, of any
            shape, negative or not.
        keep: Names of `Gather` nodes whose tables stay in FP32.

    Returns:
        The tables that were stored as int8, for each of the nodes that read one: ``node``, ``rows``, ``columns``,
        ``rms_relative`` (``‖restored − original‖ / ‖original‖``), ``bytes_before`` and ``bytes_after`` (integers and
        scales). And the nodes whose large tables stay in FP32, with the reason.
    """
    made: list[dict[str, Any]] = []
    kept: list[Kept] = []
    for table, readers in _tables(model):
        assert table.const_value is not None
        rule, why = _refusal(table, readers, keep)
        rounded = None if rule else _rounded(table.const_value.numpy())
        if rounded is not None:
            made += _store(model, table, readers, rounded)
            continue
        rule, why = (rule, why) if rule else ("not_finite", "its table holds NaN or infinities")
        kept += [Kept(str(node.name), node.op_type, rule, why) for node in readers]
    return made, kept


def _tables(model: ir.Model) -> list[tuple[ir.Value, list[ir.Node]]]:
    """The large tables, each with the nodes that gather from it, in graph order."""
    found: dict[int, tuple[ir.Value, list[ir.Node]]] = {}
    read = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None and v.uses()]
    smallest = max(SMALLEST_BYTES, SMALLEST_SHARE * sum(tensor.nbytes for tensor in read))
    for node in model.graph:
        table = node.inputs[0] if _gathers_rows(node) else None
        if table is not None and _is_table(table, smallest):
            found.setdefault(id(table), (table, []))[1].append(node)
    return list(found.values())


def _gathers_rows(node: ir.Node) -> bool:
    gathers = node.op_type == "Gather" and node.domain == "" and len(node.inputs) == 2
    return gathers and is_activation(node.inputs[1]) and node.attributes.get_int("axis", 0) in (0, -2)


def _is_table(table: ir.Value, smallest_bytes: float) -> bool:
    tensor = table.const_value
    if tensor is None or table.is_graph_input() or tensor.dtype.numpy() != np.float32:
        return False
    shape = tensor.shape.numpy()
    return len(shape) == 2 and shape[1] >= FEWEST_COLUMNS and tensor.nbytes >= smallest_bytes


def _refusal(table: ir.Value, readers: Sequence[ir.Node], keep: Collection[str]) -> tuple[str, str]:
    """The rule and the reason for a table to stay; empty where there is none."""
    if asked := [str(node.name) for node in readers if node.name in keep]:
        return "asked", "asked for by name" if len(readers) == 1 else f"{asked[0]} was asked for by name"
    # Floats that something else needs stay in the file: integers beside them would only be more.
    if others := [node for node, _ in table.uses() if not any(node is reader for reader in readers)]:
        return "shared_table", f"{others[0].name} ({others[0].op_type}) reads its table in FP32 too"
    if table.is_graph_output():
        return "shared_table", "its table is an output of the graph"
    return "", ""


def _rounded(table: Array) -> QuantizedWeight | None:
    """A table (often a memory-mapped file), rounded some rows at a time; ``None`` where it has NaN or infinities."""
    integers, scales = np.empty(table.shape, np.int8), np.empty(len(table), np.float32)
    lost = size = 0.0
    rows = max(1, _CHUNK_BYTES // (4 * table.shape[1]))
    for start in range(0, len(table), rows):
        part = np.asarray(table[start : start + rows])
        if not np.isfinite(part).all():
            return None
        made = quantize_weight(part, 0)
        integers[start : start + rows], scales[start : start + rows] = made.values, made.scales
        square = float(np.square(part.astype(np.float64)).sum())
        size += square
        lost += made.rms_relative**2 * square
    return QuantizedWeight(integers, scales, 0, (lost / size) ** 0.5 if size else 0.0)


def _store(
    model: ir.Model, table: ir.Value, readers: Sequence[ir.Node], rounded: QuantizedWeight
) -> list[dict[str, Any]]:
    from exporter.passes.graphs import add_constant

    values = add_constant(model.graph, rounded.values, f"{table.name}_quantized")
    steps = add_constant(model.graph, rounded.scales[:, None], f"{table.name}_row_scale")
    rows, columns = rounded.values.shape
    entry = {
        "rows": rows,
        "columns": columns,
        "rms_relative": rounded.rms_relative,
        "bytes_before": 4 * rows * columns,
        "bytes_after": rounded.values.nbytes + rounded.scales.nbytes,
    }
    for node in readers:
        _restore_after(node, values, steps)
    return [{"node": str(node.name), **entry} for node in readers]


def _restore_after(node: ir.Node, values: ir.Value, steps: ir.Value) -> None:
    """Replace a `Gather` of floats by one of integers (which takes over its name), and restore what it took."""
    import onnx_ir as ir

    from exporter.passes.graphs import add_node, replace_value

    ids, output = node.inputs[1], node.outputs[0]
    name, stem = output.name, node.name or output.name
    taken = add_node(node, "Gather", [values, ids], axis=0)
    taken.name, taken.dtype, taken.shape = f"{name}_rows", ir.DataType.INT8, output.shape
    scale = add_node(node, "Gather", [steps, ids], axis=0)
    scale.name, scale.dtype = f"{name}_rows_scale", ir.DataType.FLOAT
    wide = add_node(node, "Cast", [taken], like=output, to=int(ir.DataType.FLOAT))
    wide.name = f"{name}_rows_float"
    restored = add_node(node, "Mul", [wide, scale], like=output)
    replace_value(output, restored)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
    restored.name = name
    for value, suffix in ((taken, ""), (scale, "_scale"), (wide, "_float"), (restored, "_restored")):
        made = value.producer()
        assert made is not None
        made.name = f"{stem}{suffix}"
