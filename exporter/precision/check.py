"""Checks that a model is strongly typed: at every operator the types agree with its schema and with each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.errors import InternalError
from exporter.precision.facts import is_cast
from exporter.precision.schemas import has_subgraphs, schema_of, type_strings

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

_FLOATS = frozenset({1, 10, 11, 16})
_SMALL_TENSOR_BYTES = 1024
_OWN_TYPES = frozenset({"QuantizeLinear", "DequantizeLinear"})
"""Operators whose inputs have float types of their own by design."""


def check_strongly_typed(model: ir.Model | Path | str) -> None:
    """Check that a model is strongly typed, as TensorRT 11 understands it.

    ONNX's own type inference has to agree with every recorded type, and then each operator is looked at: a type
    variable of its schema stands for one type, an allowed one, and no operator reads float tensors of two types,
    except where its schema fixes one (`Resize`'s scales).

    Raises:
        InternalError: Names every operator at which types disagree.
    """
    import onnx_ir as ir

    if not isinstance(model, ir.Model):
        from exporter.onnx_files import load_model

        model = load_model(model)
    faults = list(_edge_faults(model))
    if not faults:
        faults = list(_inference_faults(model))
    if not faults and any(v.name and v.type is None for node in model.graph.all_nodes() for v in node.outputs):
        infer_types(model)
        faults = list(_edge_faults(model))
    if faults:
        raise InternalError(
            "the model is not strongly typed",
            "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else ""),
            "This is a bug in the precision conversion; keep the named nodes in FP32 to get past it",
        )


def infer_types(model: ir.Model) -> None:
    """Give every value that has no type or shape the one that ONNX infers, in place.

    What can't be inferred stays unknown: whoever needs the type of such a value deals with that. (onnx_ir's own pass
    records a sequence as a tensor.)
    """
    import onnx
    import onnx_ir as ir

    with light_proto(model) as proto:
        try:
            inferred = ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(proto, data_prop=True))
        except onnx.shape_inference.InferenceError:
            return
    for graph, typed in zip(model.graphs(), inferred.graphs(), strict=True):
        known = {value.name: value for node in typed for value in node.outputs}
        for value in (output for node in graph for output in node.outputs):
            found = known.get(value.name)
            if found is None or not value.name:
                continue
            if value.type is None:
                value.type = found.type
            if value.shape is None:
                value.shape = found.shape


def check_model(model: ir.Model) -> None:
    """Let ONNX's own checker look at a model (its weights aside, so that size does not matter).

    Raises:
        InternalError: The checker refuses it.
    """
    import onnx

    with light_proto(model) as proto:
        try:
            onnx.checker.check_model(proto)
        except onnx.checker.ValidationError as error:
            raise InternalError("ONNX's checker refuses the converted model", str(error), "Report this") from error


def _edge_faults(model: ir.Model) -> Iterator[str]:
    opsets = model.graph.opset_imports
    for node in model.graph.all_nodes():
        label = f"{node.op_type} {node.name!r}"
        values = [*node.inputs, *node.outputs]
        types = {v.name: str(v.type) for v in values if v is not None and v.name and v.type is not None}
        schema = schema_of(node, opsets)
        if schema is not None:
            yield from (f"{label}: {fault}" for fault in _schema_faults(node, schema))
        # Operators without a schema were checked by whoever made them; control flow has no float type of its own.
        if schema is None or is_cast(node) or has_subgraphs(node) or node.op_type in _OWN_TYPES:
            continue
        fixed = {f.type_str for f in schema.inputs} - {c.type_param_str for c in schema.type_constraints}
        formals = type_strings(schema.inputs, len(node.inputs))
        floats = {
            int(v.dtype)
            for formal, v in zip(formals, node.inputs, strict=True)
            if v is not None and v.dtype is not None and int(v.dtype) in _FLOATS and formal not in fixed
        }
        if len(floats) > 1:
            mixed = ", ".join(f"{v.name}: {types.get(v.name)}" for v in node.inputs if v is not None)
            yield f"{label} mixes float types ({mixed})"


def _schema_faults(node: ir.Node, schema: Any) -> Iterator[str]:
    """Type variables that stand for two types or for one that is not allowed, and casts that lie about their result."""
    import onnx_ir as ir

    allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
    heterogeneous = {
        p.type_str for p in (*schema.inputs, *schema.outputs) if getattr(p, "is_homogeneous", True) is False
    }
    bound: dict[str, tuple[str, str]] = {}
    sides = ((schema.inputs, node.inputs), (schema.outputs, node.outputs))
    for formals, actuals in sides:
        for name, value in zip(type_strings(formals, len(actuals)), actuals, strict=True):
            if value is None or not value.name or not isinstance(value.type, ir.TensorType):
                continue
            actual = f"tensor({value.type.dtype.name.lower()})"
            if name not in allowed:
                if name != actual:
                    yield f"{value.name} is {actual}, the operator takes {name}"
                continue
            if actual not in allowed[name]:
                yield f"{value.name} is {actual}, which {name} does not allow"
            first, other = bound.setdefault(name, (actual, str(value.name)))
            if first != actual and name not in heterogeneous:
                yield f"{name} is {first} at {other} and {actual} at {value.name}"
    if is_cast(node):
        declared, wanted = node.outputs[0].dtype, node.attributes["to"].as_int()
        if declared is not None and int(declared) != wanted:
            yield f"it makes type {wanted}, its output is recorded as {int(declared)}"


def _inference_faults(model: ir.Model) -> Iterator[str]:
    import onnx

    with light_proto(model) as proto:
        try:
            onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=False)
        except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
            yield f"ONNX's type inference: {error}"


@contextmanager
def light_proto(model: ir.Model) -> Iterator[onnx.ModelProto]:
    """The model as a protobuf whose larger initializers are inputs instead, so that it stays below 2 GiB."""
    import onnx_ir as ir

    graph = model.graph
    inputs = len(graph.inputs)
    large = [
        value
        for value in graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes > _SMALL_TENSOR_BYTES
    ]
    order = list(graph.initializers.values())
    try:
        for value in large:
            if not value.is_graph_input():
                graph.inputs.append(value)
            graph.initializers.pop(str(value.name))
        yield ir.serde.serialize_model(model)
    finally:
        for value in graph.inputs[inputs:]:
            graph.inputs.remove(value)
        graph.initializers.clear()
        for value in order:
            graph.initializers[str(value.name)] = value
