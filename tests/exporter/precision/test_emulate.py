from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest

from exporter.artifact import InputContract
from exporter.precision.emulate import emulate_bf16, emulate_half
from exporter.precision.half import convert

from .conftest import Writer, rms, run

RNG = np.random.default_rng(11)
NONE = InputContract()


ROUND = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_every_edge_is_rounded_by_onnxruntime_as_it_is_used(write: Writer, tmp_path: Path, precision: str) -> None:
    """Bit for bit what rounding after every operator gives, with all of ONNX Runtime's optimizations on."""
    text = """agraph (float[n, 8] x) => (float[n, 8] y) {
        p = MatMul(x, w)
        a = Add(p, b)
        t = Transpose<perm = [1, 0]>(a)
        m = Mul(t, s)
        r = Relu(m)
        q = Transpose<perm = [1, 0]>(r)
        y = MatMul(q, w)
    }"""
    w = np.diag(RNG.standard_normal(8)).astype(np.float32)  # one product per result: no order of summation
    b, s = RNG.standard_normal(8).astype(np.float32), np.float32(1.2345)

    def rounded(array: np.ndarray) -> np.ndarray:
        return array.astype(ROUND[precision]).astype(np.float32)

    path, half, out = write(text, w=w, b=b, s=s), tmp_path / "half.onnx", tmp_path / "emulated.onnx"
    convert(path, half, precision=precision, contract=NONE)  # type: ignore[arg-type]
    record = emulate_half(half, out, precision=precision)  # type: ignore[arg-type]
    assert record["emulation"] == precision
    assert record["rounded"] == 8
    x = RNG.standard_normal((5, 8)).astype(np.float32)
    step = rounded(rounded(x) @ rounded(w))
    step = rounded(step + rounded(b))
    step = np.maximum(rounded(step * rounded(np.asarray(s))), 0)
    expected = rounded(step @ rounded(w))
    assert np.array_equal(run(out, x=x)[0], expected)
    assert rms(expected, run(path, x=x)[0]) > (1e-3 if precision == "bf16" else 1e-4)


def test_kept_nodes_are_not_rounded(write: Writer, tmp_path: Path) -> None:
    path = write("agraph (float[n, 8] x) => (float[n, 8] y) { h = Softmax(x)  y = Softmax(h) }")
    convert(path, tmp_path / "bf16.onnx", precision="bf16", contract=NONE)
    record = emulate_bf16(tmp_path / "bf16.onnx", tmp_path / "emulated.onnx")
    assert record["rounded"] == 0
    x = RNG.standard_normal((5, 8)).astype(np.float32)
    assert np.array_equal(run(tmp_path / "emulated.onnx", x=x)[0], run(path, x=x)[0])


@pytest.mark.parametrize("io_types", ["fp32", "half"])
def test_convolutions_at_opset_22_run(write: Writer, tmp_path: Path, io_types: str) -> None:
    text = """agraph (float[n, 3, 8, 8] x) => (float[n, 4] y) {
        c = Conv(x, k)
        r = Relu(c)
        p = GlobalAveragePool(r)
        y = Flatten(p)
    }"""
    path = write(text, k=RNG.standard_normal((4, 3, 3, 3)).astype(np.float32))
    convert(path, tmp_path / "b.onnx", precision="bf16", contract=NONE, io_types=io_types)  # type: ignore[arg-type]
    emulate_bf16(tmp_path / "b.onnx", tmp_path / "e.onnx")
    x = RNG.standard_normal((2, 3, 8, 8)).astype(np.float32)
    (y,) = run(tmp_path / "e.onnx", x=x)
    assert y.dtype == np.float32
    assert 1e-4 < rms(y, run(path, x=x)[0]) < 2e-2
    assert all(t.data_type != onnx.TensorProto.BFLOAT16 for t in onnx.load(tmp_path / "e.onnx").graph.initializer)


def test_branches_and_filled_tensors(write: Writer, tmp_path: Path) -> None:
    text = """agraph (float[n, 8] x, bool c, int64[1] k) => (float[n, 8] y) {
        h = MatMul(x, w)
        f = ConstantOfShape<value = float[1] {1.2345}>(k)
        r = If (c) <then_branch = a () => (float[n, 8] t) { u = MatMul(h, w)  t = Mul(u, f) },
                    else_branch = b () => (float[n, 8] e) { e = Add(h, f) }>
        y = MatMul(r, w)
    }"""
    path = write(text, w=RNG.standard_normal((8, 8)).astype(np.float32))
    convert(path, tmp_path / "b.onnx", precision="bf16", contract=NONE)
    emulate_bf16(tmp_path / "b.onnx", tmp_path / "e.onnx")
    inputs = {"x": RNG.standard_normal((3, 8)).astype(np.float32), "k": np.array([8])}
    for c in (True, False):
        expected = run(path, c=np.array(c), **inputs)[0]
        assert 1e-4 < rms(run(tmp_path / "e.onnx", c=np.array(c), **inputs)[0], expected) < 3e-2
