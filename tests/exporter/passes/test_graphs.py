from __future__ import annotations

import numpy as np
import pytest

from exporter.passes import Pipeline
from exporter.passes.graphs import add_constant, reduced_axes
from exporter.passes.masks import SimplifyMasks
from exporter.passes.shapes import SimplifyShapes
from tests.exporter.passes.builders import model, run


def test_a_new_constant_takes_no_name_that_any_value_has() -> None:
    graph = model(
        """g (float[n] axes, bool c) => (float[n] y) <int64[1] axes_4 = {7}> {
            axes_1 = Relu (axes)
            y = If (c) <
                then_branch = t () => (float[n] axes_2) { axes_2 = Neg (axes_1) },
                else_branch = e () => (float[n] a) <float[1] axes_3 = {1.0}> { a = Add (axes_1, axes_3) }
            >
        }"""
    ).graph
    new = add_constant(graph, np.array([1]), "axes")
    assert new.name == "axes_5"
    assert add_constant(graph, np.array([1]), "axes") is new
    assert add_constant(graph, np.array([7]), "axes").name == "axes_4"


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("y = ReduceSum (x)", [0, 1, 2]),
        ("y = ReduceSum <noop_with_empty_axes = 1> (x)", []),
        ("y = ReduceSum (x, none)", [0, 1, 2]),
        ("y = ReduceSum <noop_with_empty_axes = 1> (x, none)", []),
        ("y = ReduceSum (x, last)", [2, 0]),
        ("y = ReduceSum (x, given)", None),
    ],
)
def test_the_axes_of_a_reduction(text: str, axes: list[int] | None) -> None:
    graph = model(
        f"""g (float[2, 3, 4] x, int64[1] given) => (float[a, b, c] y)
            <int64[2] last = {{-1, 0}}, int64[0] none = {{}}> {{ {text} }}"""
    )
    assert reduced_axes(next(iter(graph.graph)), 3) == axes


@pytest.mark.parametrize("noop", [0, 1])
def test_a_reduction_over_no_axes_in_particular_stays_true(noop: int) -> None:
    graph = model(
        f"""g (float[2, 4] x) => (float[a, b] y, float[2] size) <int64[0] none = {{}}, int64[2] shape = {{1, -1}}> {{
            s = ReduceSum <keepdims = 1, noop_with_empty_axes = {noop}> (x, none)
            y = Reshape (s, shape)
            full = Shape (s)
            size = Cast <to = 1> (full)
        }}"""
    )
    run(Pipeline([SimplifyShapes(), SimplifyMasks()]), graph, [{"x": np.ones((2, 4), np.float32)}])
