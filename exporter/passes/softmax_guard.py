"""Guards against a softmax over nothing, removed only where the input contract says that it cannot happen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from exporter.passes.base import Change, Pass, PassContext, PassRecord
from exporter.passes.graphs import (
    infer_missing,
    node_axes,
    producer,
    reduced_axes,
    remove_dead,
    replace_value,
    scalar,
    small_constant,
)
from exporter.passes.symbolic import analyse

if TYPE_CHECKING:
    import onnx_ir as ir

    from exporter.artifact import InputContract


class RemoveSoftmaxGuards(Pass):
    """Remove ``Where(IsNaN(p), 0, p)`` around a softmax `p`, and ``Where(attended keys < 1, 0, attention)`` after one.

    Both exist for rows that attend to nothing. They go only if the contract promises that every row of the mask input
    attends to something *and* the mask of this softmax is that input over the keys, the same for every query: a causal
    or sliding-window mask may leave a padded query with nothing to attend to whatever the contract says, so its guard
    stays. (A guard also hides a NaN that overflowing scores would make; without it such a NaN shows.)
    """

    name = "softmax_guard"
    why = "every row attends to at least one token by the input contract, so no softmax is over nothing"

    def apply(self, model: ir.Model, context: PassContext) -> PassRecord:
        contract = context.contract
        if not contract.attends or contract.mask is None:
            return PassRecord(self.name, "the input contract does not promise that every row attends: the guards stay")
        infer_missing(model)
        changes = []
        facts = analyse(model.graph)
        for node in list(model.graph):
            if node.op_type != "Where" or node.domain != "" or scalar(node.inputs[1]) != 0:
                continue
            kept = node.inputs[2]
            if kept is None or not (_is_nan_guard(node, contract) or _is_zeroing(node, contract)):
                continue
            # The condition or the zero may also be what gives the result its shape.
            if facts.same_shape(kept, node.outputs[0]) and replace_value(node.outputs[0], kept):
                changes.append(Change(node.name or "Where", "Where", f"every row of {contract.mask!r} attends"))
        remove_dead(model)
        return self.record(changes)


def _is_nan_guard(node: ir.Node, contract: InputContract) -> bool:
    test = producer(node.inputs[0], "IsNaN")
    softmax = producer(node.inputs[2], "Softmax")
    if test is None or softmax is None or test.inputs[0] is not node.inputs[2]:
        return False
    return _last_axis(softmax, "axis") and _is_masked_scores(softmax.inputs[0], contract)


def _is_zeroing(node: ir.Node, contract: InputContract) -> bool:
    """``Where(Less(ReduceSum(mask, -1), 1), 0, x)`` or its spellings: true for rows without any attended key."""
    condition = node.inputs[0]
    if (test := producer(condition, "Less")) is not None:
        bound = scalar(test.inputs[1])
        return bound is not None and 0 < bound <= 1 and _counts_keys(test.inputs[0], contract)
    if (test := producer(condition, "Equal")) is not None:
        return scalar(test.inputs[1]) == 0 and _counts_keys(test.inputs[0], contract)
    if (test := producer(condition, "Not")) is not None:
        inner = producer(test.inputs[0], "Cast")
        return _counts_keys(test.inputs[0] if inner is None else inner.inputs[0], contract)
    return False


def _counts_keys(value: ir.Value | None, contract: InputContract) -> bool:
    for op_type in ("ReduceSum", "ReduceMax"):
        node = producer(value, op_type)
        if node is None:
            continue
        rank = None if node.inputs[0] is None or node.inputs[0].shape is None else len(node.inputs[0].shape)
        axes = None if rank is None else reduced_axes(node, rank)
        # A sum of mask values counts keys only where each is 0 or 1: a boolean cast to a number is.
        cast = producer(node.inputs[0], "Cast")
        counted = cast is not None and cast.inputs[0] is not None and _is_boolean(cast.inputs[0])
        return counted and rank is not None and axes == [rank - 1] and _attends(node.inputs[0], contract) is True
    return False


def _is_boolean(value: ir.Value) -> bool:
    import onnx_ir as ir

    return value.dtype == ir.DataType.BOOL


def _is_masked_scores(value: ir.Value | None, contract: InputContract) -> bool:
    """Scores that are changed only where the mask input forbids the key: by addition or by selection.

    What is left without that mask must be plain scores: with another mask beside it, as a causal one, a query may have
    no key that both allow.
    """
    if (add := producer(value, "Add")) is not None:
        biases = [_is_bias(term, contract) for term in add.inputs]
        return any(biases) and all(bias or _plain(term) for bias, term in zip(biases, add.inputs, strict=True))
    if (where := producer(value, "Where")) is not None:
        attends = _attends(where.inputs[0], contract)
        if attends is None:
            return False
        allowed, forbidden = (where.inputs[i] for i in ((1, 2) if attends else (2, 1)))
        return small_constant(forbidden) is not None and _plain(allowed)
    return False


_PASSED_ON = frozenset(
    ("Add", "Cast", "Div", "Expand", "Identity", "Mul", "Neg", "Reshape", "Squeeze", "Sub", "Transpose", "Unsqueeze")
)
_LARGE = 1e4
"""No model adds or multiplies by more, unless it is to forbid a key: e^-10000 is zero in every precision."""


def _plain(value: ir.Value | None) -> bool:
    """Whether scores are products of matrices, scaled, with numbers and learned biases added: nothing that masks.

    Anything that is not known to be harmless counts as a mask.
    """
    if value is None or value.is_graph_input():
        return False
    if value.const_value is not None:
        array = value.const_value.numpy() if value.const_value.size == 1 else None
        return array is not None and bool((np.abs(np.asarray(array, np.float64)) < _LARGE).all())
    node = value.producer()
    if node is None or node.domain != "":
        return False
    if node.op_type in ("MatMul", "Gemm", "Einsum"):
        return True
    if node.op_type == "Gather":  # rows of a learned table of biases, picked by the distance between two tokens
        table = node.inputs[0]
        return table is not None and (_is_small(table) if table.const_value is not None else _plain(table))
    if node.op_type not in _PASSED_ON:
        return False
    elementwise = node.op_type in ("Add", "Div", "Mul", "Sub")
    return all(_plain(term) for term in (node.inputs if elementwise else node.inputs[:1]))


def _is_small(table: ir.Value) -> bool:
    if table.const_value is None or table.is_graph_input():
        return False
    return bool((np.abs(table.const_value.numpy().astype(np.float64)) < _LARGE).all())


def _is_bias(value: ir.Value | None, contract: InputContract) -> bool:
    """Zero where the mask input allows the key, a negative number (or minus infinity) elsewhere."""
    if (where := producer(value, "Where")) is not None:
        attends = _attends(where.inputs[0], contract)
        if attends is None:
            return False
        allowed, forbidden = (scalar(where.inputs[i]) for i in ((1, 2) if attends else (2, 1)))
        return allowed == 0 and forbidden is not None and forbidden < 0
    if (product := producer(value, "Mul")) is not None:
        for flag, factor in (product.inputs, list(product.inputs)[::-1]):
            number = scalar(factor)
            # Zero times infinity would be NaN at the allowed keys.
            if number is not None and float("-inf") < number < 0 and _attends(flag, contract) is False:
                return True
    return False


def _attends(value: ir.Value | None, contract: InputContract) -> bool | None:
    """How `value` follows the mask input, key for key along its last axis and alike for every query.

    Returns:
        True if it is non-zero exactly where the mask is, False if it is zero exactly there, ``None`` if neither is
        certain.
    """
    if value is None:
        return None
    if value.is_graph_input():
        flat = value.shape is not None and len(value.shape) == 2
        return True if value.name == contract.mask and flat else None
    node = value.producer()
    if node is None or node.domain != "":
        return None
    source = node.inputs[0] if node.inputs else None
    if node.op_type in ("Identity", "Cast"):
        return _attends(source, contract)
    if node.op_type == "Not":
        inner = _attends(source, contract)
        return None if inner is None else not inner
    if node.op_type == "Unsqueeze":
        axes, rank = node_axes(node), None if source is None or source.shape is None else len(source.shape)
        if axes is None or rank is None:
            return None
        last = rank + len(axes) - 1
        # An axis put behind the keys would make the keys something else than the last axis.
        return None if last in axes or -1 in axes else _attends(source, contract)
    if node.op_type == "Equal" and scalar(node.inputs[1]) == 0:
        inner = _attends(source, contract)
        return None if inner is None else not inner
    if node.op_type == "Sub" and scalar(source) == 1:
        # 1 - m is zero exactly where m is one: certain only for a boolean made a number.
        cast = producer(node.inputs[1], "Cast")
        if cast is not None and cast.inputs[0] is not None and _is_boolean(cast.inputs[0]):
            inner = _attends(cast.inputs[0], contract)
            return None if inner is None else not inner
    return None


def _last_axis(node: ir.Node, attribute: str) -> bool:
    axis, value = node.attributes.get_int(attribute, -1), node.inputs[0]
    rank = None if value is None or value.shape is None else len(value.shape)
    return axis == -1 or (rank is not None and axis == rank - 1)
