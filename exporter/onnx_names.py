"""Names in ONNX models: what exporters leave in the file goes, nodes and axes get names that people can read."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

_PRODUCER = "planish"
_SCOPES_KEY = "pkg.torch.onnx.name_scopes"
_ANONYMOUS = re.compile(r"val_\d+$")


def strip_metadata(model: ir.Model) -> None:
    """Remove, in place, what exporters leave in a model and what would differ between two machines.

    Doc strings, metadata (stack traces, source paths, the exporter's own graph signature) and the producer go. Before
    they go, the module path that the PyTorch exporter recorded names the nodes, so that a node is called
    ``encoder.layer.0.attention.self.query/MatMul`` and reports stay readable.
    """
    name_nodes_by_module(model)
    _name_weights_by_node(model.graph)
    model.producer_name, model.producer_version = _PRODUCER, None
    model.domain, model.model_version, model.doc_string = None, None, None
    model.metadata_props.clear()
    model.graph.name = "main"
    graphs = list(model.graphs())
    for function in model.functions.values():
        function.metadata_props.clear()
        function.doc_string = None
        graphs += [function.graph, *function.subgraphs()]
    for graph in graphs:
        graph.metadata_props.clear()
        graph.doc_string = None
        _strip([*graph.inputs, *graph.initializers.values()], graph)


def _strip(values: Iterable[ir.Value], nodes: Iterable[ir.Node]) -> None:
    import onnx_ir as ir

    held = list(values)
    for node in nodes:
        node.metadata_props.clear()
        node.doc_string = None
        held.extend(node.outputs)
        for attribute in node.attributes.values():
            attribute.doc_string = None
    for value in held:
        value.metadata_props.clear()
        value.doc_string = None
        tensor = value.const_value
        if tensor is not None and tensor.doc_string:
            value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)


def name_nodes_by_module(model: ir.Model) -> None:
    """Name nodes, in place, ``<module path>/<operator>`` where the exporter recorded the module path.

    Other nodes keep their names; a name that is taken already gets a number behind it. All names end up unique.
    """
    taken: dict[str, int] = {}
    for node in model.graph.all_nodes():
        scope = _module_scope(node.metadata_props.get(_SCOPES_KEY))
        wanted = node.name or node.op_type if scope is None else f"{scope}/{node.op_type}".lstrip("/")
        node.name = _free_name(wanted, taken)


def _name_weights_by_node(graph: ir.Graph) -> None:
    """``val_47``, the transposed weight of a linear layer, becomes ``<module path>.weight_transposed``."""
    for value in list(graph.initializers.values()):
        readers = [user for user, index in value.uses() if user.op_type == "MatMul" and index == 1]
        if not _ANONYMOUS.match(value.name or "") or len(value.uses()) != 1 or len(readers) != 1:
            continue
        scope, _, _ = (readers[0].name or "").rpartition("/")
        name = f"{scope}.weight_transposed"
        if scope and name not in graph.initializers:
            value.name = name


def _free_name(wanted: str, taken: dict[str, int]) -> str:
    if wanted not in taken:
        taken[wanted] = 0
        return wanted
    while True:
        taken[wanted] += 1
        candidate = f"{wanted}_{taken[wanted]}"
        if candidate not in taken:
            taken[candidate] = 0
            return candidate


def _module_scope(recorded: str | None) -> str | None:
    """``"['', 'm', 'm.encoder', 'linear_3']"`` -> ``"m.encoder"``: the last entry is the operation, not a module."""
    if not recorded:
        return None
    try:
        scopes = ast.literal_eval(recorded)
    except (ValueError, SyntaxError):
        return None
    if not isinstance(scopes, list) or len(scopes) < 2 or not isinstance(scopes[-2], str):
        return None
    # torch.export's stand-in for operations that belong to no module.
    return "" if scopes[-2].startswith("_empty_nn_module_stack") else scopes[-2]
