from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from exporter.artifact import InputContract
from exporter.errors import RequestError
from exporter.precision.check import check_strongly_typed
from exporter.precision.emulate import emulate_bf16
from exporter.precision.half import convert

from .conftest import Writer, kept, rms, run

RNG = np.random.default_rng(7)
NONE = InputContract()
W = RNG.standard_normal((8, 8)).astype(np.float32)
MLP = """agraph (float[batch, 8] x) => (float[batch, 8] y) {
    h = MatMul(x, w1)
    a = Relu(h)
    y = MatMul(a, w2)
}"""


def types(path: Path) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True).graph
    found = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    return found | {t.name: t.data_type for t in graph.initializer}


def ops(path: Path) -> Counter[str]:
    return Counter(n.op_type for n in onnx.load(path).graph.node)


@pytest.mark.parametrize(("precision", "onnx_type"), [("fp16", TensorProto.FLOAT16), ("bf16", TensorProto.BFLOAT16)])
def test_the_body_is_half_and_the_border_is_fp32(write: Writer, tmp_path: Path, precision: str, onnx_type: int) -> None:
    out = tmp_path / "half.onnx"
    record = convert(write(MLP, w1=W, w2=W), out, precision=precision, contract=NONE)  # type: ignore[arg-type]
    found = types(out)
    assert found["x"] == found["y"] == TensorProto.FLOAT
    assert {found[n] for n in ("h", "a", "w1", "w2")} == {onnx_type}
    assert record["converted"] == 3
    assert record["kept"] == []
    assert record["casts"] == {"inserted": 2, "removed": 0}
    assert record["weight_bytes"] == {"before": 512, "after": 256}
    onnx.checker.check_model(str(out), full_check=True)


def test_fp16_stays_close_to_fp32(write: Writer, tmp_path: Path) -> None:
    path, out = write(MLP, w1=W, w2=W), tmp_path / "half.onnx"
    convert(path, out, precision="fp16", contract=NONE)
    x = RNG.standard_normal((5, 8)).astype(np.float32)
    error = rms(run(out, x=x)[0], run(path, x=x)[0])
    assert 1e-5 < error < 1e-3


def test_half_inputs_and_outputs_when_asked(write: Writer, tmp_path: Path) -> None:
    path, out = write(MLP, w1=W, w2=W), tmp_path / "half.onnx"
    record = convert(path, out, precision="fp16", contract=NONE, io_types="half")
    assert record["casts"]["inserted"] == 0
    x = RNG.standard_normal((5, 8)).astype(np.float16)
    (y,) = run(out, x=x)
    assert y.dtype == np.float16
    assert rms(y, run(path, x=x.astype(np.float32))[0]) < 1e-3


def test_a_kept_node_at_the_border_is_cast_when_io_is_half(write: Writer, tmp_path: Path) -> None:
    text = "agraph (float[n, 8] x) => (float[n, 8] y) { y = Softmax(x) }"
    path, out = write(text), tmp_path / "half.onnx"
    convert(path, out, precision="fp16", contract=NONE, io_types="half")
    assert ops(out) == {"Cast": 2, "Softmax": 1}
    x = RNG.standard_normal((3, 8)).astype(np.float16)
    assert run(out, x=x)[0].dtype == np.float16


def test_one_cast_per_value_whoever_reads_it(write: Writer, tmp_path: Path) -> None:
    text = """agraph (float[n, 8] x) => (float[n, 8] y, float[n, 8] z) {
        a = MatMul(x, w1)
        b = MatMul(x, w2)
        h = Relu(a)
        s = Softmax(h)
        t = Softmax(h)
        y = Add(s, t)
        z = Add(h, b)
    }"""
    path, out = write(text, w1=W, w2=W), tmp_path / "half.onnx"
    record = convert(path, out, precision="fp16", contract=NONE)
    # x for both products, h for both softmaxes and z at the border.
    assert record["casts"]["inserted"] == ops(out)["Cast"] == 3
    assert kept(record) == {"softmax3": "softmax", "softmax4": "softmax", "add5": "between"}


def test_casts_never_form_a_chain(write: Writer, tmp_path: Path) -> None:
    text = """agraph (bool[n, 8] m) => (float[n, 8] y) {
        f = Cast<to = 1>(m)
        a = MatMul(f, w1)
        g = Softmax(f)
        y = Add(a, g)
    }"""
    path, out = write(text, w1=W), tmp_path / "half.onnx"
    convert(path, out, precision="fp16", contract=NONE)
    graph = onnx.load(out).graph
    made = {o: n.op_type for n in graph.node for o in n.output}
    casts = [n for n in graph.node if n.op_type == "Cast"]
    assert all(made.get(n.input[0]) != "Cast" for n in casts)
    assert [n.attribute[0].i for n in casts if n.input[0] == "m"] == [1, 10]
    m = RNG.random((3, 8)) > 0.5
    assert rms(run(out, m=m)[0], run(path, m=m)[0]) < 1e-3


def test_a_small_constant_read_both_ways_is_stored_twice_a_large_one_once(write: Writer, tmp_path: Path) -> None:
    text = """agraph (float[n, D] x) => (float[n, D] y) {
        a = MatMul(x, w)
        y = MatMul(a, w)
    }"""
    for size, where in ((8, "stored_twice"), (160, "half_with_cast")):
        weight = RNG.standard_normal((size, size)).astype(np.float32)
        path = write(text.replace("D", str(size)), w=weight, name=f"{size}.onnx")
        out = tmp_path / f"half{size}.onnx"
        record = convert(path, out, precision="fp16", contract=NONE, keep=["matmul1"])
        assert record["constants"][where] == ["w"]
        assert record["weight_bytes"]["after"] == (6 if size == 8 else 2) * weight.size
        x = RNG.standard_normal((3, size)).astype(np.float32)
        assert rms(run(out, x=x)[0], run(path, x=x)[0]) < 2e-3


def test_bf16_convolutions_move_the_model_to_opset_22(write: Writer, tmp_path: Path) -> None:
    text = "agraph (float[n, 3, 8, 8] x) => (float[n, 4, 6, 6] y) { y = Conv(x, k) }"
    kernel = RNG.standard_normal((4, 3, 3, 3)).astype(np.float32)
    path = write(text, k=kernel)
    record = convert(path, tmp_path / "b.onnx", precision="bf16", contract=NONE)
    assert record["opset"] == {"before": 20, "after": 22, "why": "bf16 for Conv"}
    assert record["converted"] == 1
    model = onnx.load(tmp_path / "b.onnx")
    assert model.opset_import[0].version == 22
    assert model.ir_version >= 10
    record = convert(path, tmp_path / "h.onnx", precision="fp16", contract=NONE)
    assert record["opset"]["after"] == 20


def test_the_opset_stays_where_raising_it_gains_nothing(write: Writer, tmp_path: Path) -> None:
    # Sin gets bfloat16 in opset 22, but a rule keeps it in FP32 all the same.
    text = "agraph (float[n, 8] x) => (float[n, 8] y) { h = MatMul(x, w1)  s = Sin(h)  y = MatMul(s, w1) }"
    record = convert(write(text, w1=W), tmp_path / "b.onnx", precision="bf16", contract=NONE)
    assert record["opset"]["after"] == 20
    assert kept(record) == {"sin1": "no_half_type"}


def test_an_operator_without_a_half_type_stays_fp32(write: Writer, tmp_path: Path) -> None:
    text = "agraph (float[n, 8] x) => (float[n, 8] y) { h = MatMul(x, w1)  c = CumSum(h, axis)  y = MatMul(c, w1) }"
    path, out = write(text, opset=11, w1=W, axis=np.array(1)), tmp_path / "half.onnx"
    record = convert(path, out, precision="fp16", contract=NONE)
    assert kept(record) == {"cumsum1": "no_half_type"}
    assert "CumSum-11" in record["kept"][0]["why"]
    x = RNG.standard_normal((3, 8)).astype(np.float32)
    assert rms(run(out, x=x)[0], run(path, x=x)[0]) < 2e-3


def test_an_operator_that_onnx_does_not_know_stays_fp32(write: Writer, tmp_path: Path) -> None:
    path = write(
        "agraph (float[n, 8] x) => (float[n, 8] y) { h = MatMul(x, w1)  g = Relu(h)  y = MatMul(g, w1) }", w1=W
    )
    model = onnx.load(path)
    model.graph.node[1].op_type, model.graph.node[1].domain = "QuickGelu", "com.microsoft"
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, path)
    out = tmp_path / "half.onnx"
    record = convert(path, out, precision="fp16", contract=NONE)
    # What an unknown operator returns has no type that could be inferred: its reader stays FP32 as well.
    assert kept(record) == {"relu1": "no_half_type", "matmul2": "no_half_type"}
    assert rms(run(out, x=np.ones((3, 8), np.float32))[0], run(path, x=np.ones((3, 8), np.float32))[0]) < 1e-3


IF = """agraph (float[n, 8] x, bool c) => (float[n, 8] y) {
    h = MatMul(x, w1)
    r = If (c) <
        then_branch = then () => (float[n, 8] t) { u = MatMul(h, w2)  t = Relu(u) },
        else_branch = other () => (float[n, 8] e) { e = Softmax(h) }
    >
    y = MatMul(r, w1)
}"""


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_branches_are_converted_and_agree_at_their_border(write: Writer, tmp_path: Path, precision: str) -> None:
    path, out = write(IF, w1=W, w2=W), tmp_path / "half.onnx"
    record = convert(path, out, precision=precision, contract=NONE)  # type: ignore[arg-type]
    check_strongly_typed(out)
    assert kept(record)["if1"] == "control_flow"
    assert "softmax" in kept(record).values()
    node = next(n for n in onnx.load(out).graph.node if n.op_type == "If")
    branches = {a.name: a.g for a in node.attribute}
    assert branches["then_branch"].node[0].op_type == "MatMul"
    assert record["converted"] >= 3
    if precision == "fp16":
        x = RNG.standard_normal((3, 8)).astype(np.float32)
        for c in (True, False):
            assert rms(run(out, x=x, c=np.array(c))[0], run(path, x=x, c=np.array(c))[0]) < 3e-3


def test_a_loop_carries_fp32_and_computes_in_half(write: Writer, tmp_path: Path) -> None:
    text = """agraph (float[n, 8] x) => (float[n, 8] y) {
        y = Loop (trips, go, x) <body = body (int64 i, bool c, float[n, 8] s) => (bool d, float[n, 8] t) {
            d = Identity(c)
            u = MatMul(s, w1)
            t = Tanh(u)
        }>
    }"""
    path = write(text, w1=W, trips=np.array(3), go=np.array(True))
    out = tmp_path / "half.onnx"
    record = convert(path, out, precision="fp16", contract=NONE)
    assert record["converted"] == 2
    x = RNG.standard_normal((3, 8)).astype(np.float32)
    assert rms(run(out, x=x)[0], run(path, x=x)[0]) < 1e-2


def test_shape_arithmetic_is_untouched(write: Writer, tmp_path: Path) -> None:
    text = """agraph (float[n, 8] x) => (float[n, 2, 4] y) {
        h = MatMul(x, w1)
        s = Shape<start = 0, end = 1>(h)
        t = Concat<axis = 0>(s, tail)
        y = Reshape(h, t)
    }"""
    path, out = write(text, w1=W, tail=np.array([2, 4])), tmp_path / "half.onnx"
    record = convert(path, out, precision="fp16", contract=NONE)
    assert record["untouched"] == 2
    assert record["casts"]["inserted"] == 2
    assert types(out)["tail"] == TensorProto.INT64


def test_constants_filled_tensors_and_castlike(write: Writer, tmp_path: Path) -> None:
    text = """agraph (float[n, 8] x, int64[1] k) => (float[n, 8] y) {
        h = MatMul(x, w1)
        one = Constant<value_float = 1.0>()
        a = Add(h, one)
        f = ConstantOfShape<value = float[1] {2.5}>(k)
        b = Mul(a, f)
        i = Not(flag)
        l = CastLike(i, x)
        y = Add(b, l)
    }"""
    path, out = write(text, w1=W, flag=np.array([True] * 8)), tmp_path / "half.onnx"
    record = convert(path, out, precision="fp16", contract=NONE)
    assert record["prepared"]["constants_lifted"] == 1
    assert record["prepared"]["cast_likes"] == 1
    found = types(out)
    assert found["f"] == found["b"] == TensorProto.FLOAT16
    x, k = RNG.standard_normal((3, 8)).astype(np.float32), np.array([8])
    assert rms(run(out, x=x, k=k)[0], run(path, x=x, k=k)[0]) < 1e-3


def test_named_nodes_are_kept(write: Writer, tmp_path: Path) -> None:
    path = write(MLP, w1=W, w2=W)
    record = convert(path, tmp_path / "half.onnx", precision="fp16", contract=NONE, keep=["matmul2"])
    assert kept(record) == {"matmul2": "asked"}
    with pytest.raises(RequestError, match="nosuch"):
        convert(path, tmp_path / "other.onnx", precision="fp16", contract=NONE, keep=["nosuch"])
    assert not (tmp_path / "other.onnx").exists()


@pytest.mark.parametrize("bad", [{"precision": "int8"}, {"io_types": "fp16"}, {"margin": 0.5}, {"rules": ["nosuch"]}])
def test_what_does_not_exist_is_refused(write: Writer, tmp_path: Path, bad: dict[str, object]) -> None:
    path = write(MLP, w1=W, w2=W)
    with pytest.raises(RequestError):
        convert(path, tmp_path / "half.onnx", **({"precision": "fp16", "contract": NONE} | bad))  # type: ignore[arg-type]


def test_the_same_model_gives_the_same_bytes(write: Writer, tmp_path: Path) -> None:
    path = write(IF, w1=W, w2=W)
    digests = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        convert(path, tmp_path / name / "m.onnx", precision="fp16", contract=NONE)
        digests.add(hashlib.sha256((tmp_path / name / "m.onnx").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_external_weights_are_read_and_written(write: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = RNG.standard_normal((64, 64)).astype(np.float32)
    path = write("agraph (float[n, 64] x) => (float[n, 64] y) { y = MatMul(x, w) }", w=weight)
    model = onnx.load(path)
    onnx.save(model, tmp_path / "ext.onnx", save_as_external_data=True, location="ext.bin", size_threshold=0)
    monkeypatch.setattr("exporter.onnx_files.EXTERNAL_DATA_THRESHOLD_BYTES", 100)
    out = tmp_path / "out" / "half.onnx"
    convert(tmp_path / "ext.onnx", out, precision="fp16", contract=NONE)
    assert (out.parent / "half.onnx_data").stat().st_size >= weight.size * 2
    loaded = {t.name: numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer}
    assert np.array_equal(loaded["w"], weight.astype(np.float16))
    x = RNG.standard_normal((3, 64)).astype(np.float32)
    assert rms(run(out, x=x)[0], run(path, x=x)[0]) < 1e-3


def test_an_output_that_is_also_read_inside_keeps_its_name(write: Writer, tmp_path: Path) -> None:
    text = "agraph (float[n, 8] x) => (float[n, 8] h, float[n, 8] y) { h = MatMul(x, w1)  y = MatMul(h, w2) }"
    path, out = write(text, w1=W, w2=W), tmp_path / "half.onnx"
    convert(path, out, precision="fp16", contract=NONE)
    x = RNG.standard_normal((3, 8)).astype(np.float32)
    for a, b in zip(run(out, x=x), run(path, x=x), strict=True):
        assert a.dtype == np.float32
        assert rms(a, b) < 1e-3
    assert [o.name for o in onnx.load(out).graph.output] == ["h", "y"]


@pytest.mark.parametrize("io_types", ["fp32", "half"])
def test_outputs_that_nothing_computes(write: Writer, tmp_path: Path, io_types: str) -> None:
    text = """agraph (float[n, 8] x, bool[n, 8] m) => (float[n, 8] x, float[8, 8] w, float[n, 8] f, float[n, 8] y) {
        f = Cast<to = 1>(m)
        y = MatMul(x, w)
    }"""
    path, out = write(text, w=W), tmp_path / "half.onnx"
    convert(path, out, precision="fp16", contract=NONE, io_types=io_types)  # type: ignore[arg-type]
    check_strongly_typed(out)
    graph = onnx.load(out).graph
    expected = TensorProto.FLOAT if io_types == "fp32" else TensorProto.FLOAT16
    assert [o.name for o in graph.output] == ["x", "w", "f", "y"]
    assert [o.type.tensor_type.elem_type for o in graph.output] == [expected] * 4
    dtype = np.float32 if io_types == "fp32" else np.float16
    x, m = RNG.standard_normal((3, 8)), np.ones((3, 8), bool)
    for a, b in zip(run(out, x=x.astype(dtype), m=m), run(path, x=x.astype(np.float32), m=m), strict=True):
        assert a.dtype == dtype
        assert rms(a, b) < 1e-3


def test_sequences_stay_fp32(write: Writer, tmp_path: Path) -> None:
    text = """agraph (float[n, 8] x) => (float[n, 8] y) {
        h = MatMul(x, w1)
        s = SplitToSequence<axis = 1>(h, two)
        c = ConcatFromSequence<axis = 1>(s)
        y = MatMul(c, w1)
    }"""
    path, out = write(text, w1=W, two=np.array(2)), tmp_path / "half.onnx"
    record = convert(path, out, precision="fp16", contract=NONE)
    assert set(kept(record)) == {"splittosequence1", "concatfromsequence2"}
    x = RNG.standard_normal((3, 8)).astype(np.float32)
    assert rms(run(out, x=x)[0], run(path, x=x)[0]) < 2e-3


def test_functions_are_inlined(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 20, "own" : 1]>
        agraph (float[n, 8] x, float[8, 8] w) => (float[n, 8] y) { h = MatMul(x, w)  y = own.twice(h) }
        <domain: "own", opset_import: ["" : 20]> twice (a) => (b) { c = Add(a, a)  b = Relu(c) }""")
    path, out = tmp_path / "model.onnx", tmp_path / "half.onnx"
    onnx.save(model, path)
    record = convert(path, out, precision="fp16", contract=NONE)
    assert record["prepared"]["functions_inlined"] == 1
    assert record["converted"] == 3
    x = RNG.standard_normal((3, 8)).astype(np.float32)
    assert rms(run(out, x=x, w=W)[0], run(path, x=x, w=W)[0]) < 1e-3


def test_the_softmax_inside_attention_stays_fp32(write: Writer, tmp_path: Path) -> None:
    text = "agraph (float[n, 2, s, 8] q) => (float[n, 2, s, 8] y) { k = MatMul(q, w1)  y = Attention(k, k, q) }"
    path, out = write(text, opset=23, w1=W), tmp_path / "half.onnx"
    record = convert(path, out, precision="fp16", contract=NONE)
    assert record["softmax_fp32_inside"] == ["attention1"]
    assert record["converted"] == 2
    check_strongly_typed(out)


def test_a_model_that_is_half_already_is_left_alone(write: Writer, tmp_path: Path) -> None:
    text = "agraph (float16[n, 8] x) => (float16[n, 8] y) { y = MatMul(x, w) }"
    path, out = write(text, w=W.astype(np.float16)), tmp_path / "half.onnx"
    record = convert(path, out, precision="fp16", contract=NONE)
    assert (record["converted"], record["untouched"], record["casts"]["inserted"]) == (0, 1, 0)


def test_a_partly_half_model_gets_no_idle_casts(write: Writer, tmp_path: Path) -> None:
    text = """agraph (float16[n, 8] x) => (float16[n, 8] y) {
        f = Cast<to = 1>(x)
        h = MatMul(f, w1)
        y = Cast<to = 10>(h)
    }"""
    path, out = write(text, w1=W), tmp_path / "half.onnx"
    record = convert(path, out, precision="fp16", contract=NONE)
    assert record["converted"] == 1
    x = RNG.standard_normal((3, 8)).astype(np.float16)
    assert rms(run(out, x=x)[0], run(path, x=x)[0]) < 1e-3
    assert ops(out)["Cast"] <= 1


@pytest.mark.parametrize("opset", [13, 17, 21])
def test_older_opsets_reach_22_with_their_weights(write: Writer, tmp_path: Path, opset: int) -> None:
    text = """agraph (float[1, 3, 8, 8] x) => (float[1, 4, 6, 6] y) {
        c = Conv(x, k)
        s = Squeeze(c, axes)
        u = Unsqueeze(s, axes)
        y = Mul(u, g)
    }"""
    kernel, gain = RNG.standard_normal((4, 3, 3, 3)).astype(np.float32), RNG.random((4, 6, 6)).astype(np.float32)

    path = write(text, opset=opset, k=kernel, g=gain, axes=np.array([0]))
    out = tmp_path / "b.onnx"
    record = convert(path, out, precision="bf16", contract=NONE)
    assert record["opset"]["after"] == 22
    assert record["converted"] == 4
    emulate_bf16(out, tmp_path / "e.onnx")
    x = RNG.standard_normal((1, 3, 8, 8)).astype(np.float32)
    assert rms(run(tmp_path / "e.onnx", x=x)[0], run(path, x=x)[0]) < 2e-2
