from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from exporter.artifact import InputContract
from exporter.errors import InternalError
from exporter.precision.check import check_strongly_typed
from exporter.precision.half import convert

from .conftest import Writer

W = np.eye(8, dtype=np.float32)
TEXT = """agraph (float[n, 8] x, bool c) => (float[n, 8] y) {
    h = MatMul(x, w)
    s = Softmax(h)
    r = If (c) <then_branch = a () => (float[n, 8] t) { u = MatMul(h, w)  t = Add(u, s) },
                else_branch = b () => (float[n, 8] e) { e = MatMul(s, w) }>
    y = MatMul(r, w)
}"""


@pytest.fixture
def half(write: Writer, tmp_path: Path) -> Path:
    convert(write(TEXT, w=W), tmp_path / "half.onnx", precision="fp16", contract=InputContract())
    check_strongly_typed(tmp_path / "half.onnx")
    return tmp_path / "half.onnx"


def graphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    inner = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return [graph, *(found for g in inner for found in graphs(g))]


def casts(model: onnx.ModelProto) -> list[tuple[onnx.GraphProto, onnx.NodeProto]]:
    return [(g, n) for g in graphs(model.graph) for n in g.node if n.op_type == "Cast"]


@pytest.mark.parametrize("recorded", [True, False])
def test_every_cast_is_needed(half: Path, recorded: bool) -> None:
    """Remove one cast after the other: each removal is noticed.

    Without the recorded types, a graph in which the types happen to agree again is none that ONNX Runtime refuses.
    """
    noticed = 0
    count = len(casts(onnx.load(half)))
    assert count >= 6
    for index in range(count):
        model = onnx.load(half)
        home, cast = casts(model)[index]
        for graph in graphs(model.graph):
            if not recorded:
                del graph.value_info[:]
            for node in graph.node:
                for i, name in enumerate(node.input):
                    if name == cast.output[0]:
                        node.input[i] = cast.input[0]
            for output in graph.output:
                if output.name == cast.output[0]:
                    output.name = cast.input[0]
        home.node.remove(cast)
        onnx.save(model, half.with_name("mutant.onnx"))
        if recorded or refused(half.with_name("mutant.onnx")):
            noticed += 1
            with pytest.raises(InternalError, match="not strongly typed"):
                check_strongly_typed(half.with_name("mutant.onnx"))
        else:
            check_strongly_typed(half.with_name("mutant.onnx"))
    assert noticed >= count - 1


def refused(path: Path) -> bool:
    try:
        ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except (ort_errors.Fail, ort_errors.InvalidGraph):
        return True
    return False


def test_a_mixed_operator_is_named(half: Path) -> None:
    model = onnx.load(half)
    softmax = next(n for n in model.graph.node if n.op_type == "Softmax")
    softmax.op_type = "Add"
    del softmax.attribute[:]
    softmax.input.append("x_fp16")
    onnx.save(model, half)
    with pytest.raises(InternalError, match="softmax1"):
        check_strongly_typed(half)


def test_operators_that_onnx_allows_to_mix_are_refused(write: Writer) -> None:
    """ONNX's own inference lets Pow take two float types; a strongly typed builder does not."""
    path = write("agraph (float[n, 8] x, float16 e) => (float[n, 8] y) { y = Pow(x, e) }")
    with pytest.raises(InternalError, match=r"Pow 'pow0' mixes float types"):
        check_strongly_typed(path)


def test_a_wrong_recorded_type_is_found(write: Writer) -> None:
    path = write("agraph (float[n, 8] x) => (float[n, 8] y) { h = Relu(x)  y = Relu(h) }")
    model = onnx.load(path)
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("h", onnx.TensorProto.FLOAT16, ["n", 8]))
    onnx.save(model, path)
    with pytest.raises(InternalError, match="relu0"):
        check_strongly_typed(path)


def test_fixed_types_may_differ_by_design(write: Writer) -> None:
    text = "agraph (float16[1, 1, 4, 4] x) => (float16[1, 1, 8, 8] y) { y = Resize(x, , scales) }"
    check_strongly_typed(write(text, scales=np.array([1, 1, 2, 2], np.float32)))
