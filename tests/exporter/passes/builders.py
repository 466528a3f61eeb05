"""Small ONNX graphs, written as text, for the tests of the passes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir

from exporter.passes import Pass, PassContext, PassRecord, run_pass
from exporter.passes.checks import run_model

HEADER = '<ir_version: 10, opset_import: ["" : 20]>\n'


def model(text: str, **weights: np.ndarray) -> ir.Model:
    """The graph in `text` (ONNX's own text form, without its header) with further initializers."""
    proto = onnx.parser.parse_model(HEADER + text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    onnx.checker.check_model(proto)
    loaded = ir.from_proto(proto)
    for value in loaded.graph.initializers.values():
        assert value.const_value is not None
        value.shape, value.dtype = value.const_value.shape.copy(), value.const_value.dtype
    return loaded


def run(step: Pass, graph: ir.Model, samples: list[dict[str, np.ndarray]], **contract: Any) -> PassRecord:
    """Run one pass the way pipelines run it: checked on `samples`."""
    from exporter.artifact import InputContract

    with PassContext(InputContract(**contract), samples) as context:
        return run_pass(step, graph, context)


def outputs(graph: ir.Model, samples: list[dict[str, np.ndarray]], folder: Any) -> list[dict[str, np.ndarray]]:
    return run_model(graph, samples, folder)


def operators(graph: ir.Model) -> list[str]:
    return [node.op_type for node in graph.graph]


ATTENTION = """
attention (float[batch, 2, sequence, 4] q, float[batch, 2, sequence, 4] k, int64[batch, sequence] attention_mask)
    => (float[batch, 2, sequence, 4] y) <int64[2] axes = {1, 2}, int64[1] last = {-1}, float zero = {0.0},
        float minus = {%(minus)s}, float one = {1.0}, int64 start = {0}, int64 step = {1}, int64[1] front = {0}> {
    allowed = Cast <to = 9> (attention_mask)
    keys = Unsqueeze (allowed, axes)
    %(mask)s
    bias = Where (visible, zero, minus)
    kt = Transpose <perm = [0, 1, 3, 2]> (k)
    scores = MatMul (q, kt)
    masked = Add (scores, bias)
    p = Softmax <axis = -1> (masked)
    nan = IsNaN (p)
    safe = Where (nan, zero, p)
    attended = MatMul (safe, k)
    counted = Cast <to = 1> (visible)
    count = ReduceSum <keepdims = 1> (counted, last)
    nothing = Less (count, one)
    y = Where (nothing, zero, attended)
}"""

PADDING = "visible = Identity (keys)"
CAUSAL = """length = Shape <start = 1, end = 2> (attention_mask)
    n = Squeeze (length)
    position = Range (start, n, step)
    rows = Unsqueeze (position, last)
    columns = Unsqueeze (position, front)
    before = GreaterOrEqual (rows, columns)
    visible = And (keys, before)"""


def attention(mask: str = PADDING, *, minus: float = -math.inf) -> ir.Model:
    """One attention with both guards: a NaN test around the softmax and zeroing of rows that attend to nothing."""
    number = "-inf" if math.isinf(minus) else repr(minus)
    text = ATTENTION % {"mask": mask, "minus": "0.0" if math.isinf(minus) else number}
    graph = model(text)
    if math.isinf(minus):
        graph.graph.initializers["minus"].const_value = ir.tensor(np.array(minus, np.float32), name="minus")
    return graph


def attention_samples(*, nothing: bool = False, left: bool = False) -> list[dict[str, np.ndarray]]:
    """Ragged batches; with `nothing`, the last row attends to no token; with `left`, padding comes first."""
    random = np.random.default_rng(7)
    samples = []
    for batch, length in ((1, 1), (3, 5), (2, 8)):
        mask = np.ones((batch, length), np.int64)
        for row in range(1, batch):
            mask[row, length - row :] = 0
        if left:
            mask = mask[:, ::-1].copy()
        if nothing:
            mask[-1] = 0
        q, k = (random.standard_normal((batch, 2, length, 4)).astype(np.float32) for _ in range(2))
        samples.append({"q": q, "k": k, "attention_mask": mask})
    return samples
