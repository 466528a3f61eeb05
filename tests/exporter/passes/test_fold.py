from __future__ import annotations

import numpy as np

from exporter.passes.fold import FoldConstants, Simplify
from tests.exporter.passes.builders import model, operators, run

SAMPLES = [{"x": np.arange(6, dtype=np.float32).reshape(2, 3)}, {"x": np.ones((1, 3), np.float32)}]


def test_constants_are_computed_and_dead_code_goes() -> None:
    graph = model(
        """g (float[n, 3] x) => (float[n, 3] y) <float two = {2.0}, float three = {3.0}, float unused = {1.0}> {
            six = Mul (two, three)
            dead = Neg (x)
            y = Add (x, six)
        }"""
    )
    record = run(FoldConstants(), graph, SAMPLES)
    assert operators(graph) == ["Add"]
    assert {change.op for change in record.changes} == {"Mul", "Neg"}
    assert all(change.why for change in record.changes)
    assert "unused" not in graph.graph.initializers


def test_a_second_time_changes_nothing() -> None:
    graph = model(
        """g (float[n, 3] x) => (float[n, 3] y) <float two = {2.0}, float three = {3.0}> {
            six = Mul (two, three)
            y = Add (x, six)
        }"""
    )
    run(FoldConstants(), graph, SAMPLES)
    assert run(FoldConstants(), graph, SAMPLES).changed == 0


def test_a_weight_that_others_read_is_not_copied_by_folding() -> None:
    weight = np.random.default_rng(0).standard_normal((1024, 600)).astype(np.float32)
    text = """g (int64[n] ids) => (float[n, 1024] y) {
            h = Gather <axis = 0> (w, ids)
            t = Transpose <perm = [1, 0]> (w)
            y = MatMul (h, t)
        }"""
    graph = model(text, w=weight)
    run(FoldConstants(), graph, [{"ids": np.array([0, 5])}])
    assert operators(graph) == ["Gather", "Transpose", "MatMul"]
    assert list(graph.graph.initializers) == ["w"]


def test_operators_that_do_nothing_go() -> None:
    graph = model(
        """g (float[n, 3] x) => (float[n, 3] y) <float zero = {0.0}, float one = {1.0}> {
            a = Add (x, zero)
            b = Mul (a, one)
            d = Transpose <perm = [0, 1]> (b)
            y = Neg (d)
        }"""
    )
    record = run(Simplify(), graph, SAMPLES)
    assert operators(graph) == ["Neg"]
    assert record.changed == 3


def test_batch_normalization_is_merged_within_the_wider_bound() -> None:
    random = np.random.default_rng(3)
    graph = model(
        """g (float[n, 3, 6, 6] x) => (float[n, 4, 6, 6] y) {
            c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w)
            y = BatchNormalization (c, scale, bias, mean, var)
        }""",
        w=random.standard_normal((4, 3, 3, 3)).astype(np.float32),
        scale=random.uniform(0.5, 2, 4).astype(np.float32),
        bias=random.standard_normal(4).astype(np.float32),
        mean=random.standard_normal(4).astype(np.float32),
        var=random.uniform(0.5, 2, 4).astype(np.float32),
    )
    samples = [{"x": random.standard_normal((2, 3, 6, 6)).astype(np.float32)}]
    record = run(Simplify(), graph, samples)
    assert operators(graph) == ["Conv"]
    assert record.rms_relative is not None
    assert record.rms_relative < 1e-5
