"""Every pass over models with branches and loops, whose bodies read values of the graph around them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from exporter.artifact import InputContract
from exporter.passes import Pass, run_pass
from exporter.passes.base import PassContext
from exporter.passes.dedupe import Deduplicate
from exporter.passes.fold import FoldConstants, Simplify
from exporter.passes.graphs import remove_identities
from exporter.passes.masks import SimplifyMasks
from exporter.passes.optimize import default_pipeline
from exporter.passes.shapes import SimplifyShapes
from exporter.passes.softmax_guard import RemoveSoftmaxGuards
from tests.exporter.passes.builders import model, operators, outputs, run

BRANCH = """g (float[n, 4] x, bool c) => (float[n, 4] y) <float one = {1.0}, float zero = {0.0}> {
    r = Relu (x)
    same = Identity (r)
    y = If (c) <
        then_branch = t () => (float[n, 4] a) { b = Add (same, zero) m = Mul (b, one) a = Neg (m) },
        else_branch = e () => (float[n, 4] d) { d = Identity (r) }
    >
}"""
LOOP = """g (float[n, 4] x, int64 count) => (float[n, 4] y, float[k, n, 4] all)
    <float half = {0.5}, float zero = {0.0}, bool yes = {1}> {
    r = Relu (x)
    y, all = Loop (count, yes, r) <
        body = b (int64 i, bool go, float[n, 4] v) => (bool on, float[n, 4] next, float[n, 4] seen) {
            on = Identity (go)
            scaled = Mul (v, half)
            more = Add (scaled, zero)
            next = Add (more, r)
            seen = Identity (r)
        }
    >
}"""
X = np.array([[1, -2, 3, 4], [5, 6, -7, 8]], np.float32)
CASES = {
    "branch": (BRANCH, [{"x": X, "c": np.array(value)} for value in (True, False)]),
    "loop": (LOOP, [{"x": X, "count": np.array(count)} for count in (1, 3)]),
}
PASSES: list[Pass] = [
    FoldConstants(),
    Simplify(),
    SimplifyShapes(),
    SimplifyMasks(),
    RemoveSoftmaxGuards(),
    Deduplicate(),
    default_pipeline(InputContract(attends=True, mask="x")),
    default_pipeline(InputContract(), fuse=True),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("step", PASSES, ids=lambda step: step.name)
def test_branches_and_loops_stay_true(step: Pass, case: str) -> None:
    text, samples = CASES[case]
    graph = model(text)
    with PassContext(InputContract(attends=True, mask="x"), samples) as context:
        record = run_pass(step, graph, context)
    assert record.rms_relative == 0


def test_an_identity_goes_where_nothing_needs_it_and_stays_where_it_makes_an_output(tmp_path: Path) -> None:
    text, samples = CASES["branch"]
    graph = model(text)
    before = outputs(graph, samples, tmp_path)
    remove_identities(graph)
    assert operators(graph) == ["Relu", "If"]
    assert [node.op_type for node in graph.graph.all_nodes()].count("Identity") == 1
    for a, b in zip(before, outputs(graph, samples, tmp_path), strict=True):
        np.testing.assert_array_equal(a["y"], b["y"])


def test_two_outputs_of_one_value_keep_their_names() -> None:
    graph = model(
        """g (float[n, 4] x) => (float[n, 4] y, float[n, 4] z, float[n, 4] same) {
            r = Relu (x)
            y = Identity (r)
            z = Identity (y)
            same = Identity (x)
        }"""
    )
    run(FoldConstants(), graph, [{"x": X}])
    assert [value.name for value in graph.graph.outputs] == ["y", "z", "same"]
    assert isinstance(graph.graph.outputs[0].producer(), ir.Node)
    assert operators(graph) == ["Relu", "Identity", "Identity"]
