from __future__ import annotations

import numpy as np
import pytest

from exporter.passes.dims import ONE, Dim, broadcast, parse_dim, volume
from exporter.passes.symbolic import analyse
from exporter.passes.uniform import positions, uniform_values
from tests.exporter.passes.builders import model

A, B = Dim(1, ("a",)), Dim(1, ("b",))


def test_products_and_exact_quotients() -> None:
    assert volume([Dim(3), A, B, A]) == Dim(3, ("a", "a", "b"))
    assert Dim(12, ("a", "b")).over(Dim(4, ("b",))) == Dim(3, ("a",))
    assert Dim(12, ("a",)).over(B) is None
    assert Dim(12).over(Dim(5)) is None
    assert str(Dim(2, ("a", "b"))) == "2*a*b"


@pytest.mark.parametrize(
    ("recorded", "dim"),
    [(3, Dim(3)), ("a", A), ("2*a", Dim(2, ("a",))), ("a + 1", Dim(1, ("a+1",))), (None, None), ("", None)],
)
def test_recorded_dimensions(recorded: int | str | None, dim: Dim | None) -> None:
    assert parse_dim(recorded) == dim


def test_broadcasting_is_only_claimed_where_it_is_certain() -> None:
    assert broadcast([(A, ONE), (B,)]) == (A, B)
    assert broadcast([(A,), (B,)]) is None
    assert broadcast([(A,), (Dim(5),)]) == (Dim(5),)
    assert broadcast([(ONE,), ()]) == (ONE,)
    assert broadcast([(Dim(2),), (Dim(5),)]) is None


def test_shapes_follow_the_graph_without_anything_recorded() -> None:
    graph = model(
        """g (float[a, b, 6] x) => (float[p, q] y) <int64[4] heads = {0, 0, 2, -1}, int64[1] two = {2}> {
            split = Reshape (x, heads)
            turned = Transpose <perm = [0, 2, 3, 1]> (split)
            scores = MatMul (split, turned)
            sum = ReduceSum <keepdims = 0> (split, two)
            flat = Flatten <axis = 2> (sum)
            y = Neg (flat)
        }"""
    ).graph
    facts = analyse(graph)
    shapes = {value.name: facts.shape(value) for node in graph for value in node.outputs}
    assert shapes["split"] == (A, B, Dim(2), Dim(3))
    assert shapes["turned"] == (A, Dim(2), Dim(3), B)
    assert shapes["sum"] == (A, B, Dim(3))
    # Where b meets 2 it can only be 2 or 1.
    assert shapes["scores"] == (A, Dim(2), Dim(2), B)


def test_a_vector_made_two_dimensional_is_not_read_as_a_shape() -> None:
    graph = model(
        """g (float[a, b] x) => (int64[p] y) <int64[1] zero = {0}, int64 first = {0}> {
            shape = Shape (x)
            row = Unsqueeze (shape, zero)
            y = Gather <axis = 0> (row, first)
        }"""
    ).graph
    facts = analyse(graph)
    contents = {value.name: facts.contents.get(value) for node in graph for value in node.outputs}
    assert contents["shape"] == (A, B)
    assert contents["row"] is None
    assert contents["y"] is None


def test_positions_and_uniform_values() -> None:
    graph = model(
        """g (float[a, b] x) => (bool[1, n] y, float[n] z)
            <int64 none = {0}, int64 step = {1}, int64[1] front = {0}, int64 three = {3}> {
            size = Shape <start = 1, end = 2> (x)
            n = Squeeze (size)
            index = Range (none, n, step)
            row = Unsqueeze (index, front)
            y = GreaterOrEqual (row, none)
            late = GreaterOrEqual (row, three)
            wide = Expand (weight, size)
            z = Neg (wide)
        }""",
        weight=np.zeros(4, np.float32)[:1],
    ).graph
    from onnx_ir import DataType

    for node in graph:
        node.outputs[0].dtype = node.outputs[0].dtype or DataType.FLOAT
    facts = analyse(graph)
    indices = positions(graph, facts)
    assert {value.name: axis for value, axis in indices.items()} == {"index": 0, "row": 1}
    uniform = {value.name: number for value, number in uniform_values(graph, facts, indices).items()}
    assert uniform["y"]
    assert "late" not in uniform
    assert uniform["wide"] == 0
