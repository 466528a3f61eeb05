"""Which tensors of an operator may be half precision, read from ONNX's own operator schemas, never from a list."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exporter.errors import RequestError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

FLOAT = 1
"""ONNX's number of the element type float32."""

_TYPE_ATTRIBUTES = ("dtype", "output_datatype", "output_dtype", "to")


@dataclass(frozen=True)
class HalfType:
    """A 16-bit floating point type.

    Attributes:
        name: As a precision is called in recipes.
        onnx_type: ONNX's number of the element type.
        schema_name: As operator schemas call it.
        largest: Its largest finite value.
        unit_roundoff: Half the distance between 1 and the next larger value.
        largest_integer: Every integer up to it is exact.
        smallest_normal: The smallest positive number with all bits of precision.
    """

    name: str
    onnx_type: int
    schema_name: str
    largest: float
    unit_roundoff: float
    largest_integer: int
    smallest_normal: float

    def numpy_dtype(self) -> np.dtype[Any]:
        """NumPy's dtype of the type (BF16's comes from `ml_dtypes`)."""
        import ml_dtypes
        import numpy as np

        return np.dtype(ml_dtypes.bfloat16 if self.name == "bf16" else np.float16)


HALF_TYPES: dict[str, HalfType] = {
    "fp16": HalfType("fp16", 10, "tensor(float16)", 65504.0, 2.0**-11, 2048, 2.0**-14),
    "bf16": HalfType("bf16", 16, "tensor(bfloat16)", (2.0 - 2.0**-7) * 2.0**127, 2.0**-8, 256, 2.0**-126),
}
"""IEEE 754 binary16 and bfloat16."""


def half_type(precision: str) -> HalfType:
    """The half type of a precision.

    Raises:
        RequestError: `precision` is neither ``"fp16"`` nor ``"bf16"``.
    """
    if precision not in HALF_TYPES:
        raise RequestError("not a half precision", precision, f"Choose one of: {', '.join(HALF_TYPES)}")
    return HALF_TYPES[precision]


@dataclass(frozen=True)
class Slots:
    """The float types that an operator has once it is half: per input and output, an ONNX type; ``None``: not float."""

    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]


@dataclass(frozen=True)
class Blocked:
    """Why an operator can't be half."""

    why: str


def is_float(value: ir.Value | None) -> bool:
    """Whether `value` is a float32 tensor (not a sequence of them)."""
    return value is not None and _is_tensor(value) and value.dtype is not None and int(value.dtype) == FLOAT


def _is_tensor(value: ir.Value) -> bool:
    import onnx_ir as ir

    return isinstance(value.type, ir.TensorType)


def touches_float(node: ir.Node) -> bool:
    """Whether the node reads or writes a float32 tensor, or something whose type nobody knows."""
    values = [*node.inputs, *node.outputs]
    return any(v is not None and bool(v.name) and (v.type is None or is_float(v)) for v in values)


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    """The graphs in a node's attributes."""
    import onnx_ir as ir

    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            found.extend(attribute.as_graphs())
    return found


def has_subgraphs(node: ir.Node) -> bool:
    """Whether the node is a control-flow operator (If, Loop, Scan …)."""
    return bool(subgraphs(node))


def schema_of(node: ir.Node, opsets: Mapping[str, int]) -> Any | None:
    """The operator's schema at the model's opset; ``None`` where ONNX knows none."""
    import onnx

    domain = "" if node.domain == "ai.onnx" else node.domain
    try:
        return onnx.defs.get_schema(node.op_type, opsets.get(domain, 1), domain)
    except onnx.defs.SchemaError:
        return None


def type_strings(formals: Any, count: int) -> list[str]:
    """The formal type of each of `count` actual parameters; the last formal one repeats when it is variadic."""
    names = [formal.type_str for formal in formals]
    if not names:
        return [""] * count
    return [names[min(index, len(names) - 1)] for index in range(count)]


def type_attribute(node: ir.Node) -> str | None:
    """The attribute that says "the output is float32", if the node has one (`ConstantOfShape`'s is a tensor)."""
    import onnx_ir as ir

    for name in _TYPE_ATTRIBUTES:
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.type == ir.AttributeType.INT and attribute.value == FLOAT:
            return name
    value = node.attributes.get("value")
    if node.op_type == "ConstantOfShape" and value is not None and int(value.as_tensor().dtype) == FLOAT:
        return "value"
    return None


def half_slots(node: ir.Node, opsets: Mapping[str, int], half: HalfType) -> Slots | Blocked:
    """The types at every input and output once the node computes in `half`, or why it can't.

    A type variable of the schema that stands for a float32 input becomes half as a whole or blocks the node, so no
    operator ever gets float inputs of two types. Inputs that the schema fixes to float32 (`Resize`'s scales) stay.
    """
    if any(v is not None and v.name and v.type is None for v in (*node.inputs, *node.outputs)):
        return Blocked("the type of one of its inputs or outputs can't be inferred")
    if any(v is not None and v.type is not None and not _is_tensor(v) for v in (*node.inputs, *node.outputs)):
        return Blocked("it reads or makes a sequence or an optional value")
    schema = schema_of(node, opsets)
    if schema is None:
        return Blocked(f"ONNX has no schema for {node.domain or 'ai.onnx'}::{node.op_type}")
    constraints = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
    version = f"{node.op_type}-{schema.since_version}"
    inputs = type_strings(schema.inputs, len(node.inputs))
    outputs = type_strings(schema.outputs, len(node.outputs))

    taken = [name for name, value in zip(inputs, node.inputs, strict=True) if is_float(value)]
    variables = {name for name in taken if name in constraints}
    blocked = sorted(name for name in variables if half.schema_name not in constraints[name])
    if blocked:
        return Blocked(f"{version} takes no {half.name} for {', '.join(blocked)}")
    made = {name for name, value in zip(outputs, node.outputs, strict=True) if is_float(value)}
    if not variables:
        attribute = type_attribute(node)
        variables = {name for name in made if name in constraints}
        if not variables or attribute is None:
            return Blocked(f"{version} has float32 inputs or outputs only")
        if any(half.schema_name not in constraints[name] for name in variables):
            return Blocked(f"{version} makes no {half.name}")
    elif type_attribute(node) is not None:
        variables |= {n for n in made if n in constraints and half.schema_name in constraints[n]}

    def slot(name: str, value: ir.Value | None) -> int | None:
        if not is_float(value):
            return None
        return half.onnx_type if name in variables else FLOAT

    return Slots(
        tuple(slot(n, v) for n, v in zip(inputs, node.inputs, strict=True)),
        tuple(slot(n, v) for n, v in zip(outputs, node.outputs, strict=True)),
    )
