from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.passes.dims import Dim
from exporter.passes.graphs import integers
from exporter.passes.shapes import SimplifyShapes, reshape_target
from tests.exporter.passes.builders import model, operators, run

RANDOM = np.random.default_rng(2)


def floats(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


HEADS = """
g (float[batch, sequence, 12] x) => (float[batch, a, b, c] y)
    <int64[1] heads = {3}, int64[1] rest = {-1}, int64[1] two = {2}, int64[1] one = {1}, int64[1] zero = {0}> {
    shape = Shape (x)
    first = Slice (shape, zero, one)
    second = Gather <axis = 0> (shape, one)
    target = Concat <axis = 0> (first, second, heads, rest)
    split = Reshape <allowzero = 1> (x, target)
    y = Transpose <perm = [0, 2, 1, 3]> (split)
}"""
X = [{"x": floats(1, 1, 12)}, {"x": floats(2, 5, 12)}]


def test_a_computed_target_becomes_a_constant() -> None:
    graph = model(HEADS)
    record = run(SimplifyShapes(), graph, X)
    assert operators(graph) == ["Reshape", "Transpose"]
    reshape = next(iter(graph.graph))
    assert integers(reshape.inputs[1]) == [0, 0, 3, 4]
    assert reshape.attributes.get_int("allowzero", 0) == 0
    assert record.rms_relative == 0
    assert "follows from the shapes" in record.changes[0].why
    assert run(SimplifyShapes(), graph, X).changed == 0


def test_a_key_transposed_through_three_dimensions_is_transposed_once() -> None:
    graph = model(
        """g (float[batch, sequence, 12] x) => (float[batch, 3, a, b] y)
            <int64[4] heads = {0, 0, 3, 4}, int64[1] rest = {-1}, int64[1] end = {9223372036854775807},
             int64[1] start = {-9223372036854775808}, int64[1] back = {-2}> {
            split = Reshape (x, heads)
            key = Transpose <perm = [0, 2, 1, 3]> (split)
            shape = Shape (key)
            d = Slice (shape, rest, end)
            s = Slice (shape, back, rest)
            front = Slice (shape, start, back)
            flat_target = Concat <axis = 0> (rest, s, d)
            flat = Reshape (key, flat_target)
            flipped = Transpose <perm = [0, 2, 1]> (flat)
            target = Concat <axis = 0> (front, d, s)
            y = Reshape (flipped, target)
        }"""
    )
    record = run(SimplifyShapes(), graph, X)
    assert operators(graph) == ["Reshape", "Transpose"]
    assert list(list(graph.graph)[1].attributes["perm"].as_ints()) == [0, 2, 3, 1]
    assert record.rms_relative == 0


def test_no_ops_go() -> None:
    graph = model(
        """g (float[batch, 6] x) => (float[batch, 6] y)
            <int64[1] zero = {0}, int64[1] end = {9223372036854775807}, int64[1] axis = {1}, int64[1] one = {1},
             int64[2] same = {0, 6}> {
            shape = Shape (x)
            a = Expand (x, shape)
            b = Slice (a, zero, end, axis, one)
            c = Reshape (b, same)
            d = Transpose <perm = [1, 0]> (c)
            e = Transpose <perm = [1, 0]> (d)
            f = Cast <to = 1> (e)
            y = Neg (f)
        }"""
    )
    record = run(SimplifyShapes(), graph, [{"x": floats(3, 6)}])
    assert operators(graph) == ["Neg"]
    assert record.changed == 5


def test_a_slice_that_takes_a_part_stays() -> None:
    graph = model(
        """g (float[batch, 6] x) => (float[batch, n] y)
            <int64[1] zero = {0}, int64[1] end = {5}, int64[1] axis = {1}, int64[1] one = {1}> {
            y = Slice (x, zero, end, axis, one)
        }"""
    )
    assert run(SimplifyShapes(), graph, [{"x": floats(3, 6)}]).changed == 0


def test_sizes_without_names_are_not_taken_for_equal() -> None:
    # Two inputs whose lengths have different names: the target belongs to the other one.
    graph = model(
        """g (float[a, b] x, float[c, d] z) => (float[e, f] y) {
            target = Shape (z)
            y = Reshape (x, target)
        }"""
    )
    run(SimplifyShapes(), graph, [{"x": floats(2, 6), "z": floats(4, 3)}])
    assert operators(graph) == ["Shape", "Reshape"]


def test_equal_sizes_of_different_values_are_computed_once() -> None:
    graph = model(
        """g (float[n, 3] x, float[n, 4] z) => (float[n] y) <float[1] one = {1.0}, float[1] two = {2.0}> {
            first = Shape <start = 0, end = 1> (x)
            second = Shape <start = 0, end = 1> (z)
            ones = Expand (one, first)
            twos = Expand (two, second)
            y = Add (ones, twos)
        }"""
    )
    record = run(SimplifyShapes(), graph, [{"x": floats(2, 3), "z": floats(2, 4)}])
    assert operators(graph).count("Shape") == 1
    assert any("always equal to first" in change.why for change in record.changes)


def test_a_merge_of_two_dimensions_is_the_one_that_is_left_open() -> None:
    graph = model(
        """g (float[batch, sequence, 4] x) => (float[m, 4] y) <int64[1] four = {4}> {
            b = Shape <start = 0, end = 1> (x)
            s = Shape <start = 1, end = 2> (x)
            n = Mul (b, s)
            target = Concat <axis = 0> (n, four)
            y = Reshape (x, target)
        }"""
    )
    run(SimplifyShapes(), graph, [{"x": floats(2, 3, 4)}])
    assert operators(graph) == ["Reshape"]
    assert integers(next(iter(graph.graph)).inputs[1]) == [-1, 4]


SIZES = st.sampled_from([Dim(1), Dim(3), Dim(4), Dim(1, ("a",)), Dim(1, ("b",)), Dim(2, ("a",)), Dim(1, ("a", "b"))])


@given(st.lists(SIZES, min_size=1, max_size=4), st.lists(SIZES, min_size=1, max_size=4))
def test_a_target_says_the_wanted_shape_for_every_size(source: list[Dim], wanted: list[Dim]) -> None:
    target = reshape_target(tuple(source), tuple(wanted))
    if target is None:
        return
    for sizes in ({"a": 2, "b": 5}, {"a": 7, "b": 1}):
        numbers = [[d.factor * int(np.prod([sizes[s] for s in d.symbols])) for d in dims] for dims in (source, wanted)]
        if np.prod(numbers[0]) != np.prod(numbers[1]):
            continue
        copied = [numbers[0][i] if t == 0 else t for i, t in enumerate(target)]
        assert list(np.zeros(numbers[0]).reshape(copied).shape) == numbers[1]


@pytest.mark.parametrize(("source", "wanted"), [([Dim(1, ("a",))] * 2, [Dim(1, ("b",))] * 2)])
def test_two_open_dimensions_have_no_target(source: list[Dim], wanted: list[Dim]) -> None:
    assert reshape_target(tuple(source), tuple(wanted)) is None
