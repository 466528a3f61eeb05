"""Symbolic shapes: what is known of every tensor's shape, and of the small integer tensors that shapes are made of.

A dimension is a product of an integer and named symbols (``12 * batch``). Two dimensions with the same value here are
equal for every input that the model accepts; what is not known is a symbol of its own that equals only itself. Symbols
are taken to be at least 1, as the axes of a signature are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from exporter.passes.dims import ONE, Dim, Shape, broadcast, parse_dim, unknown, volume
from exporter.passes.graphs import integers, node_axes, reduced_axes, scalar

if TYPE_CHECKING:
    import onnx_ir as ir

# fmt: off
UNARY = frozenset((
    "Abs", "Cast", "Ceil", "Clip", "Cos", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid",
    "HardSwish", "Identity", "IsInf", "IsNaN", "LayerNormalization", "LeakyRelu", "Log", "LogSoftmax", "Mish",
    "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softmax", "Softplus",
    "Sqrt", "Tanh", "Trilu", "BatchNormalization", "InstanceNormalization", "GroupNormalization", "CumSum",
))
# fmt: on
"""Operators whose first output has the shape of their first input."""

# fmt: off
BROADCAST = frozenset((
    "Add", "And", "BitwiseAnd", "BitwiseOr", "Div", "Equal", "Greater", "GreaterOrEqual", "Less",
    "LessOrEqual", "Max", "Min", "Mod", "Mul", "Or", "Pow", "Sub", "Sum", "Where", "Xor",
))
# fmt: on
"""Operators that work element by element, with broadcasting."""

# fmt: off
ELEMENTWISE = BROADCAST | frozenset((
    "Abs", "Cast", "Ceil", "Cos", "Erf", "Exp", "Floor", "Identity", "IsInf", "IsNaN", "Log", "Neg", "Not",
    "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin", "Sqrt", "Tanh",
))
# fmt: on
"""Operators whose output element depends on nothing but the input elements at its place."""

_MAX_CONTENT = 16


@dataclass
class Facts:
    """What is known of a graph's values.

    Attributes:
        shapes: Of every tensor whose rank is known.
        contents: The elements of integer tensors of rank 0 or 1 with few elements, as dimensions.
    """

    shapes: dict[ir.Value, Shape] = field(default_factory=dict)
    contents: dict[ir.Value, tuple[Dim, ...]] = field(default_factory=dict)

    def shape(self, value: ir.Value | None) -> Shape | None:
        """The shape, also of a constant or of an input."""
        if value is None:
            return None
        if value not in self.shapes:
            recorded = recorded_shape(value)
            if recorded is None:
                return None
            self.shapes[value] = recorded
        return self.shapes[value]

    def content(self, value: ir.Value | None) -> tuple[Dim, ...] | None:
        """The elements of a small integer tensor, where they are known."""
        if value is None:
            return None
        if value in self.contents:
            return self.contents[value]
        numbers = integers(value)
        if numbers is None or len(numbers) > _MAX_CONTENT:
            return None
        return tuple(Dim(number) for number in numbers)

    def same_shape(self, first: ir.Value | None, second: ir.Value | None) -> bool:
        """Whether both shapes are known to be the same."""
        shape = self.shape(first)
        return shape is not None and shape == self.shape(second)


def recorded_shape(value: ir.Value) -> Shape | None:
    """The shape that the file gives, or that a constant has."""
    if value.const_value is not None and not value.is_graph_input():
        return tuple(Dim(int(d)) for d in value.const_value.shape.numpy())
    if value.shape is None:
        return None
    dims = (parse_dim(d if isinstance(d, int) else d.value) for d in value.shape)
    return tuple(unknown(value, index) if dim is None else dim for index, dim in enumerate(dims))


def analyse(graph: ir.Graph) -> Facts:
    """Walk the graph once and collect what is known; what the file records fills the gaps."""
    facts = Facts()
    for node in graph:
        if node.domain != "" or not node.outputs:
            continue
        output = node.outputs[0]
        content = _content(node, facts)
        if content is not None and len(content) <= _MAX_CONTENT:
            facts.contents[output] = content
        inferred = _inferred(node, facts)
        recorded = recorded_shape(output)
        if inferred is None:
            continue
        if recorded is not None and len(recorded) == len(inferred):
            inferred = tuple(i if i.known else r for i, r in zip(inferred, recorded, strict=True))
        facts.shapes[output] = inferred
    return facts


def _inferred(node: ir.Node, facts: Facts) -> Shape | None:
    if node.op_type in UNARY:
        return facts.shape(node.inputs[0])
    if node.op_type in BROADCAST:
        shapes = [facts.shape(value) for value in node.inputs]
        return None if None in shapes else broadcast([s for s in shapes if s is not None])
    rule = _SHAPE_RULES.get(node.op_type)
    return None if rule is None else rule(node, facts)


def _content(node: ir.Node, facts: Facts) -> tuple[Dim, ...] | None:
    rule = _CONTENT_RULES.get(node.op_type)
    return None if rule is None else rule(node, facts)


# Shapes


def _matmul(node: ir.Node, facts: Facts) -> Shape | None:
    a, b = facts.shape(node.inputs[0]), facts.shape(node.inputs[1])
    if a is None or b is None or len(a) < 2 or len(b) < 2:
        return None
    leading = broadcast([a[:-2], b[:-2]])
    return None if leading is None else (*leading, a[-2], b[-1])


def _transpose(node: ir.Node, facts: Facts) -> Shape | None:
    shape = facts.shape(node.inputs[0])
    if shape is None:
        return None
    return tuple(shape[axis] for axis in permutation(node, len(shape)))


def permutation(node: ir.Node, rank: int) -> list[int]:
    """The axes of a `Transpose`, its default (all reversed) included."""
    attribute = node.attributes.get("perm")
    return list(range(rank))[::-1] if attribute is None else [int(axis) for axis in attribute.as_ints()]


def _reshape(node: ir.Node, facts: Facts) -> Shape | None:
    source, target = facts.shape(node.inputs[0]), facts.content(node.inputs[1])
    if target is None:
        return None
    copies = node.attributes.get_int("allowzero", 0) == 0
    dims: list[Dim | None] = []
    for index, dim in enumerate(target):
        if dim == Dim(-1):
            dims.append(None)
        elif dim == Dim(0) and copies:
            if source is None or index >= len(source):
                return None
            dims.append(source[index])
        else:
            dims.append(dim)
    if None in dims:
        rest = None if source is None else volume(source).over(volume([d for d in dims if d is not None]))
        index = dims.index(None)
        dims[index] = unknown(node.outputs[0], index) if rest is None else rest
    return tuple(d for d in dims if d is not None)


def _unsqueeze(node: ir.Node, facts: Facts) -> Shape | None:
    shape, axes = facts.shape(node.inputs[0]), node_axes(node)
    if shape is None or axes is None:
        return None
    rank = len(shape) + len(axes)
    new, rest = {axis % rank for axis in axes}, iter(shape)
    return tuple(ONE if index in new else next(rest) for index in range(rank))


def _squeeze(node: ir.Node, facts: Facts) -> Shape | None:
    shape, axes = facts.shape(node.inputs[0]), node_axes(node)
    if shape is None:
        return None
    if axes is None:
        return tuple(d for d in shape if d != ONE) if all(d.static for d in shape) else None
    gone = {axis % len(shape) for axis in axes}
    return tuple(dim for index, dim in enumerate(shape) if index not in gone)


def _gather(node: ir.Node, facts: Facts) -> Shape | None:
    data, index = facts.shape(node.inputs[0]), facts.shape(node.inputs[1])
    if data is None or index is None or not data:
        return None
    axis = node.attributes.get_int("axis", 0) % len(data)
    return (*data[:axis], *index, *data[axis + 1 :])


def _slice(node: ir.Node, facts: Facts) -> Shape | None:
    shape, window = facts.shape(node.inputs[0]), slice_window(node)
    if shape is None or window is None:
        return None
    dims = list(shape)
    for axis, (start, end, step) in window.items():
        axis %= len(shape)
        dim = dims[axis]
        if dim.static:
            dims[axis] = Dim(len(range(*slice(start, end, step).indices(dim.factor))))
        elif not (start == 0 and step == 1 and end >= _ALL):
            dims[axis] = unknown(node.outputs[0], axis)
    return tuple(dims)


_ALL = 2**31 - 1


def slice_window(node: ir.Node) -> dict[int, tuple[int, int, int]] | None:
    """Axis -> (start, end, step) of a `Slice` whose bounds are constants, else ``None``."""
    inputs = list(node.inputs[1:]) + [None] * (5 - len(node.inputs))
    starts, ends = integers(inputs[0]), integers(inputs[1])
    if starts is None or ends is None:
        return None
    axes = list(range(len(starts))) if inputs[2] is None else integers(inputs[2])
    steps = [1] * len(starts) if inputs[3] is None else integers(inputs[3])
    if axes is None or steps is None:
        return None
    return {a: (s, e, t) for a, s, e, t in zip(axes, starts, ends, steps, strict=True)}


def _concat(node: ir.Node, facts: Facts) -> Shape | None:
    shapes = [facts.shape(value) for value in node.inputs]
    if None in shapes or not shapes[0]:
        return None
    known = [shape for shape in shapes if shape is not None]
    axis = node.attributes.get_int("axis", 0) % len(known[0])
    parts = [shape[axis] for shape in known]
    total = Dim(sum(d.factor for d in parts)) if all(d.static for d in parts) else unknown(node.outputs[0], axis)
    return (*known[0][:axis], total, *known[0][axis + 1 :])


def _expand(node: ir.Node, facts: Facts) -> Shape | None:
    shape, target = facts.shape(node.inputs[0]), facts.content(node.inputs[1])
    return None if shape is None or target is None else broadcast([shape, target])


def _reduce(node: ir.Node, facts: Facts) -> Shape | None:
    shape = facts.shape(node.inputs[0])
    gone = None if shape is None else reduced_axes(node, len(shape))
    if shape is None or gone is None:
        return None
    if node.attributes.get_int("keepdims", 1):
        return tuple(ONE if index in gone else dim for index, dim in enumerate(shape))
    return tuple(dim for index, dim in enumerate(shape) if index not in gone)


def _range(node: ir.Node, facts: Facts) -> Shape | None:
    limit = facts.content(node.inputs[1])
    if scalar(node.inputs[0]) == 0 and scalar(node.inputs[2]) == 1 and limit is not None:
        return (limit[0],)
    return (unknown(node.outputs[0], 0),)


def _shape_of_shape(node: ir.Node, facts: Facts) -> Shape | None:
    content = facts.contents.get(node.outputs[0])
    return None if content is None else (Dim(len(content)),)


_SHAPE_RULES: dict[str, Callable[[ir.Node, Facts], Shape | None]] = {
    "MatMul": _matmul,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Expand": _expand,
    "Range": _range,
    "Shape": _shape_of_shape,
    **{f"Reduce{kind}": _reduce for kind in ("Sum", "Mean", "Max", "Min", "L1", "L2", "Prod", "SumSquare")},
}


# Contents of shape tensors


def _shape_content(node: ir.Node, facts: Facts) -> tuple[Dim, ...] | None:
    shape = facts.shape(node.inputs[0])
    if shape is None:
        return None
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(shape))
    return shape[slice(start, end)]


def _passed_on(node: ir.Node, facts: Facts) -> tuple[Dim, ...] | None:
    import onnx_ir as ir

    if node.op_type == "Cast" and node.attributes.get_int("to", 0) not in (ir.DataType.INT64, ir.DataType.INT32):
        return None
    return facts.content(node.inputs[0])


def _reranked(node: ir.Node, facts: Facts) -> tuple[Dim, ...] | None:
    """Between a scalar and a vector of one element; anything of a higher rank has no content here."""
    content = facts.content(node.inputs[0])
    wanted = () if node.op_type == "Unsqueeze" else (ONE,)
    return content if content is not None and len(content) == 1 and facts.shape(node.inputs[0]) == wanted else None


def _gathered(node: ir.Node, facts: Facts) -> tuple[Dim, ...] | None:
    content, index = facts.content(node.inputs[0]), integers(node.inputs[1])
    if content is None or index is None or node.attributes.get_int("axis", 0) != 0:
        return None
    return tuple(content[i] for i in index) if all(-len(content) <= i < len(content) for i in index) else None


def _sliced(node: ir.Node, facts: Facts) -> tuple[Dim, ...] | None:
    content, window = facts.content(node.inputs[0]), slice_window(node)
    if content is None or window is None or set(window) - {0, -1} or len(window) != 1:
        return None
    (start, end, step) = next(iter(window.values()))
    return content[slice(start, end, step)]


def _joined(node: ir.Node, facts: Facts) -> tuple[Dim, ...] | None:
    parts = [facts.content(value) for value in node.inputs]
    return None if None in parts else tuple(dim for part in parts if part is not None for dim in part)


def _multiplied(node: ir.Node, facts: Facts) -> tuple[Dim, ...] | None:
    a, b = facts.content(node.inputs[0]), facts.content(node.inputs[1])
    if a is None or b is None or (len(a) != len(b) and 1 not in (len(a), len(b))):
        return None
    size = max(len(a), len(b))
    return tuple(x * y for x, y in zip(a * (size // len(a)), b * (size // len(b)), strict=True))


def _divided(node: ir.Node, facts: Facts) -> tuple[Dim, ...] | None:
    a, b = facts.content(node.inputs[0]), facts.content(node.inputs[1])
    if a is None or b is None or len(a) != len(b):
        return None
    quotients = [x.over(y) for x, y in zip(a, b, strict=True)]
    return None if None in quotients else tuple(q for q in quotients if q is not None)


_CONTENT_RULES: dict[str, Callable[[ir.Node, Facts], tuple[Dim, ...] | None]] = {
    "Shape": _shape_content,
    "Cast": _passed_on,
    "Identity": _passed_on,
    "Unsqueeze": _reranked,
    "Squeeze": _reranked,
    "Gather": _gathered,
    "Slice": _sliced,
    "Concat": _joined,
    "Mul": _multiplied,
    "Div": _divided,
}
