from __future__ import annotations

import numpy as np

from exporter.passes.masks import SimplifyMasks
from tests.exporter.passes.builders import model, operators, run

GRID = """
g (int64[batch, sequence] mask, float[batch, 1, sequence, sequence] scores)
    => (float[batch, 1, sequence, sequence] y) <int64 start = {0}, int64 step = {1}, int64[3] axes_b = {1, 2, 3},
    int64[3] axes_k = {0, 1, 2}, int64[1] last = {-1}, float zero = {0.0}, float minus = {-1000.0}, int64 none = {0},
    int64[3] axes_q = {0, 1, 3}, bool[1, 1, 1, 1] true = {1}> {
    b1 = Shape <start = 0, end = 1> (mask)
    s1 = Shape <start = 1, end = 2> (mask)
    b = Squeeze (b1)
    s = Squeeze (s1)
    rows = Range (start, b, step)
    keys = Range (start, s, step)
    row = Unsqueeze (rows, axes_b)
    key = Unsqueeze (keys, axes_k)
    query = Unsqueeze (keys, axes_q)
    largest = Max (row, key)
    shape = Shape (largest)
    row_grid = Expand (row, shape)
    key_grid = Expand (key, shape)
    row_column = Unsqueeze (row_grid, last)
    key_column = Unsqueeze (key_grid, last)
    grid = Concat <axis = -1> (%(order)s)
    allowed = Cast <to = 9> (mask)
    picked = GatherND (allowed, grid)
    valid = GreaterOrEqual (query, none)
    always = And (true, valid)
    visible = And (always, picked)
    bias = Where (visible, zero, minus)
    y = Add (scores, bias)
}"""


def samples(*shapes: tuple[int, int]) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(1)
    return [
        {
            "mask": random.integers(0, 2, (b, s)),
            "scores": random.standard_normal((b, 1, s, s)).astype(np.float32),
        }
        for b, s in shapes
    ]


def test_the_grid_becomes_an_unsqueeze_and_the_mask_is_not_broadcast() -> None:
    graph = model(GRID % {"order": "row_column, key_column"})
    record = run(SimplifyMasks(), graph, samples((1, 1), (2, 5), (3, 4)))
    assert operators(graph) == ["Cast", "Unsqueeze", "Where", "Add"]
    assert record.rms_relative == 0
    assert any("inserts the axes [1, 2]" in change.why for change in record.changes)
    assert run(SimplifyMasks(), graph, samples((2, 5))).changed == 0


def test_a_grid_that_transposes_stays() -> None:
    graph = model(GRID % {"order": "key_column, row_column"})
    run(SimplifyMasks(), graph, samples((4, 4), (2, 2)))
    assert "GatherND" in operators(graph)


def test_positions_of_another_axis_are_no_grid() -> None:
    # Row indices counted along the sequence: out of range wherever the two differ.
    graph = model(
        GRID.replace("rows = Range (start, b, step)", "rows = Range (start, s, step)")
        % {"order": "row_column, key_column"}
    )
    run(SimplifyMasks(), graph, [])
    assert "GatherND" in operators(graph)


def test_a_comparison_that_can_fail_stays() -> None:
    graph = model(GRID.replace("int64 none = {0}", "int64 none = {1}") % {"order": "row_column, key_column"})
    run(SimplifyMasks(), graph, samples((2, 5)))
    assert "GreaterOrEqual" in operators(graph)


def test_a_sum_over_a_broadcast_axis_still_counts_the_copies() -> None:
    graph = model(
        """g (float[n, 1] x, float[n, 4] z) => (float[n, 1] y) <int64[1] last = {1}> {
            shape = Shape (z)
            wide = Expand (x, shape)
            y = ReduceSum <keepdims = 1> (wide, last)
        }"""
    )
    sample = {"x": np.array([[3.0]], np.float32), "z": np.zeros((1, 4), np.float32)}
    run(SimplifyMasks(), graph, [sample])
    assert operators(graph) == ["Shape", "Expand", "ReduceSum"]


def test_a_mask_that_allows_everything_disappears() -> None:
    graph = model(
        """g (float[n, 2, 5, 5] scores) => (float[n, 2, 5, 5] y)
            <int64[1] last = {-1}, float one = {1.0}, float zero = {0.0}, float minus = {-3.4e38},
             int64[3] rest = {1, 5, 5}> {
            n = Shape <start = 0, end = 1> (scores)
            target = Concat <axis = 0> (n, rest)
            all = Expand (true, target)
            number = Cast <to = 1> (all)
            forbidden = Not (all)
            flag = Cast <to = 1> (forbidden)
            bias = Mul (flag, minus)
            count = ReduceSum <keepdims = 1> (number, last)
            nothing = Less (count, one)
            masked = Add (scores, bias)
            p = Softmax <axis = -1> (masked)
            y = Where (nothing, zero, p)
        }""",
        true=np.ones((1, 1, 5, 1), bool),
    )
    from onnx_ir.passes.common import ShapeInferencePass

    ShapeInferencePass()(graph)
    record = run(
        SimplifyMasks(), graph, [{"scores": np.random.default_rng(0).standard_normal((3, 2, 5, 5), np.float32)}]
    )
    assert operators(graph) == ["Softmax"]
    assert record.rms_relative == 0


def test_a_bias_that_happens_to_be_zero_stays() -> None:
    graph = model("g (float[n, 4] x) => (float[n, 4] y) { y = Add (x, bias) }", bias=np.zeros(4, np.float32))
    assert run(SimplifyMasks(), graph, [{"x": np.ones((2, 4), np.float32)}]).changed == 0


def test_rows_are_gathered_once_for_indices_that_are_broadcast() -> None:
    graph = model(
        """g (int64[1, s] ids, float[n, s, 3] x) => (float[n, s, 3] y) <int64[2] zero = {0, 0}> {
            shape = Shape <start = 0, end = 2> (x)
            all = Expand (ids, shape)
            rows = Gather <axis = 0> (table, all)
            y = Add (rows, x)
        }""",
        table=np.arange(12, dtype=np.float32).reshape(4, 3),
    )
    sample = {"ids": np.array([[3, 0]]), "x": np.ones((5, 2, 3), np.float32)}
    record = run(SimplifyMasks(), graph, [sample])
    assert operators(graph) == ["Gather", "Add"]
    assert record.rms_relative == 0


def test_a_broadcast_that_an_output_needs_stays() -> None:
    graph = model(
        """g (float[n, 1] x, float[n, 4] z) => (float[n, 4] y) {
            shape = Shape (z)
            y = Expand (x, shape)
        }"""
    )
    run(SimplifyMasks(), graph, [{"x": np.ones((2, 1), np.float32), "z": np.zeros((2, 4), np.float32)}])
    assert operators(graph) == ["Shape", "Expand"]
