from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from exporter.onnx_files import weight_bytes
from exporter.passes.dedupe import Deduplicate, _digest
from tests.exporter.passes.builders import model, operators, run

RANDOM = np.random.default_rng(5)


def test_equal_weights_are_stored_once_whatever_their_size() -> None:
    weight = RANDOM.standard_normal((700, 700)).astype(np.float32)
    other = weight.copy()
    other[-1, -1] += 1
    graph = model(
        """g (float[n, 700] x) => (float[n, 700] y) {
            a = MatMul (x, first)
            b = MatMul (a, second)
            y = MatMul (b, third)
        }""",
        first=weight,
        second=weight.copy(),
        third=other,
    )
    record = run(Deduplicate(), graph, [{"x": RANDOM.standard_normal((2, 700)).astype(np.float32)}])
    assert sorted(graph.graph.initializers) == ["first", "third"]
    assert weight_bytes(graph) == 2 * weight.nbytes
    assert [(change.node, change.op, change.why) for change in record.changes] == [
        ("second", "Initializer", "equal to first")
    ]
    assert record.rms_relative == 0


def test_equal_bytes_of_another_type_or_shape_stay() -> None:
    graph = model(
        """g (float[n, 2] x) => (float[n, 2] y) <float[1] a = {0.0}, float[1, 1] b = {0.0}, int64[2] s = {0, 0}> {
            c = Add (x, a)
            d = Add (c, b)
            y = Identity (d)
        }""",
        t=np.zeros(4, np.int32),
    )
    run(Deduplicate(), graph, [{"x": np.ones((1, 2), np.float32)}])
    assert {"a", "b"} <= set(graph.graph.initializers)


def test_equal_expressions_are_computed_once() -> None:
    graph = model(
        """g (float[n, 2] x) => (float[n, 2] y) {
            a = Exp (x)
            b = Exp (x)
            y = Add (a, b)
        }"""
    )
    record = run(Deduplicate(), graph, [{"x": np.ones((1, 2), np.float32)}])
    assert operators(graph) == ["Exp", "Add"]
    assert record.changes[0].why == "computes what another node computes"
    assert run(Deduplicate(), graph, [{"x": np.ones((1, 2), np.float32)}]).changed == 0


def test_a_tied_embedding_is_stored_once_although_it_is_used_transposed() -> None:
    table = RANDOM.standard_normal((1500, 256)).astype(np.float32)
    graph = model(
        """g (int64[n] ids) => (float[n, 1500] y) {
            h = Gather <axis = 0> (table, ids)
            y = MatMul (h, head)
        }""",
        head=np.ascontiguousarray(table.T),
        table=table,
    )
    samples = [{"ids": np.array([1, 2, 1499])}]
    record = run(Deduplicate(), graph, samples)
    assert list(graph.graph.initializers) == ["table"]
    assert operators(graph) == ["Gather", "Transpose", "MatMul"]
    assert record.changes[0].why == "the transpose of table"
    assert record.rms_relative is not None
    assert record.rms_relative < 1e-6
    assert run(Deduplicate(), graph, samples).changed == 0


def test_a_matrix_that_is_nearly_a_transpose_stays() -> None:
    table = RANDOM.standard_normal((1500, 256)).astype(np.float32)
    head = np.ascontiguousarray(table.T)
    head[-1, -1] = 0
    graph = model(
        """g (int64[n] ids) => (float[n, 1500] y) {
            h = Gather <axis = 0> (table, ids)
            y = MatMul (h, head)
        }""",
        head=head,
        table=table,
    )
    assert run(Deduplicate(), graph, [{"ids": np.array([3])}]).changed == 0


def test_types_without_a_numpy_buffer_have_a_digest() -> None:
    values = np.arange(4).astype(ml_dtypes.bfloat16)
    assert _digest(ir.tensor(values)) == _digest(ir.tensor(values.copy()))
    assert _digest(ir.tensor(values)) != _digest(ir.tensor(values[::-1].copy()))
    strings = ir.StringTensor(np.array([b"ab", b"c"]), shape=ir.Shape([2]))
    shifted = ir.StringTensor(np.array([b"a", b"bc"]), shape=ir.Shape([2]))
    assert _digest(strings) != _digest(shifted)


TIED_IN_A_BRANCH = """g (int64[n] ids, bool c) => (float[n, 600] y) {
    h = Gather <axis = 0> (table, ids)
    z = If (c) <
        then_branch = t () => (float[n, 600] a) { a = MatMul (h, head) },
        else_branch = e () => (float[n, 600] b) { b = Neg (h) }
    >
    y = MatMul (z, head)
}"""


@pytest.mark.parametrize("first", ["table", "head"])
def test_a_tied_matrix_that_a_branch_reads_stays(first: str) -> None:
    table = RANDOM.standard_normal((600, 600)).astype(np.float32)
    weights = {"table": table, "head": np.ascontiguousarray(table.T)}
    graph = model(TIED_IN_A_BRANCH, **{name: weights[name] for name in sorted(weights, key=lambda n: n != first)})
    samples = [{"ids": np.array([1, 2]), "c": np.array(value)} for value in (True, False)]
    assert run(Deduplicate(), graph, samples).changed == 0


def test_equal_initializers_that_are_outputs_stay() -> None:
    graph = model(
        """g (float[3] x) => (float[3] y, float[3] one, float[3] two)
            <float[3] one = {1.0, 1.0, 1.0}, float[3] two = {1.0, 1.0, 1.0}> { y = Add (x, one) }"""
    )
    assert run(Deduplicate(), graph, [{"x": np.ones(3, np.float32)}]).changed == 0
    assert [value.name for value in graph.graph.outputs] == ["y", "one", "two"]
