"""Weights alone as integers: what ONNX Runtime computes with them, what is stored, and what is left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calibration.quantize.blocks import quantize_blocks
from calibration.quantize.weight_only import quantize_weight_only
from exporter.artifact import Artifact, Axis, InputContract, Signature, TensorSpec, Variant
from exporter.errors import NotApplicableError, RequestError
from exporter.targets import get_target
from exporter.targets.onnxruntime import kernels_that_run

from .conftest import batches, rms, run, weights

LINEAR = ["MatMul_q0", "MatMul_k0", "MatMul_v0", "MatMul_o0", "MatMul_up0", "MatMul_down0"]
EXACT = 1
"""The accuracy level at which activations stay in FP32."""

PRODUCTS = """
<ir_version: 9, opset_import: ["" : 20]>
products (float[n, 45] x, float[n, 32] z) => (float[n, 32] y) {
  a = MatMul (x, w)
  b = MatMul (x, w)
  c = Gemm <transB = 1> (z, square, bias)
  d = Gemm (z, square)
  e = Gemm <alpha = 0.5> (z, square)
  ab = Mul (a, b)
  cd = Mul (c, d)
  all = Add (ab, cd)
  y = Add (all, e)
}
"""


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """Products that share weights, in both directions, with a length that no block divides."""
    rng = np.random.default_rng(4)
    shapes = {"w": (45, 32), "square": (32, 32), "bias": (32,)}
    model = onnx.parser.parse_model(PRODUCTS)
    for name, shape in shapes.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    for node in model.graph.node:
        node.name = node.output[0]
    onnx.checker.check_model(model, full_check=True)
    path = tmp_path / "several.onnx"
    onnx.save(model, path)
    return path


def stored(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def with_restored_weights(path: Path, out: Path, bits: int, block_size: int, symmetric: bool) -> Path:
    """The graph with each matrix as its integers stand for it, in FP32."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.ndim == 2:
            rounded = quantize_blocks(array, bits, block_size, symmetric=symmetric).restored()
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(rounded), tensor.name))
    onnx.save(model, out)
    return out


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_it_computes_with_the_weights_that_the_integers_stand_for(
    encoder: Path, tmp_path: Path, bits: int, symmetric: bool, block_size: int
) -> None:
    out = tmp_path / "weights.onnx"
    how = {"bits": bits, "block_size": block_size, "symmetric": symmetric}
    record = quantize_weight_only(encoder, out, accuracy_level=EXACT, **how)
    assert [entry["node"] for entry in record["quantized"]] == LINEAR
    expected = with_restored_weights(encoder, tmp_path / "restored.onnx", **how)
    for batch in batches(3, seed=8):
        np.testing.assert_allclose(run(out, batch)[0], run(expected, batch)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("bits", "low", "high"), [(4, 0.01, 0.15), (8, 1e-3, 0.02)])
def test_by_default_it_is_near_the_original(encoder: Path, tmp_path: Path, bits: int, low: float, high: float) -> None:
    out = tmp_path / "weights.onnx"
    record = quantize_weight_only(encoder, out, bits=bits)
    assert record["symmetric"] is False
    for batch in batches(4, seed=8):
        assert low < rms(run(out, batch)[0], run(encoder, batch)[0]) < high
    for entry, name in zip(record["quantized"], ["wq", "wk", "wv", "wo", "wu", "wd"], strict=True):
        made = quantize_blocks(weights()[name], bits, 32, symmetric=False)
        assert entry["weight_rms_relative"] == pytest.approx(made.rms_relative)


def test_shared_weights_padding_and_gemm(several: Path, tmp_path: Path) -> None:
    out = tmp_path / "weights.onnx"
    record = quantize_weight_only(several, out, bits=4, accuracy_level=EXACT)
    assert [entry["node"] for entry in record["quantized"]] == ["a", "b", "c", "d"]
    assert [(entry["node"], entry["rule"]) for entry in record["kept"]] == [("e", "no_weight_only_form")]
    assert "scales or transposes" in record["kept"][0]["why"]
    held = stored(out)
    # `w` once for two products; `square` once in either direction, and in FP32 for the product that was kept.
    assert sorted(name for name in held if "int4" in name) == ["square_int4", "square_int4_1", "w_int4"]
    assert held["w_int4"].shape == (32, 2, 16)
    assert "w" not in held
    original = stored(several)
    w = quantize_blocks(original["w"], 4, 32, symmetric=False).restored()
    turned = quantize_blocks(original["square"].T, 4, 32, symmetric=False).restored()
    square = quantize_blocks(original["square"], 4, 32, symmetric=False).restored()
    rng = np.random.default_rng(9)
    x, z = (rng.standard_normal((3, width)).astype(np.float32) for width in (45, 32))
    expected = (x @ w) ** 2 + (z @ turned + original["bias"]) * (z @ square) + 0.5 * z @ original["square"]
    np.testing.assert_allclose(run(out, {"x": x, "z": z})[0], expected, rtol=1e-4, atol=1e-4)


def test_the_operator_is_imported_and_runs(encoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "weights.onnx"
    quantize_weight_only(encoder, out, bits=4)
    model = onnx.load(out)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 20, "com.microsoft": 1}
    assert {node.op_type for node in model.graph.node if node.domain} == {"MatMulNBits"}
    assert not {"wq", "wk", "wv", "wo", "wu", "wd"} & {tensor.name for tensor in model.graph.initializer}
    kernels = kernels_that_run(out)
    assert kernels["MatMulNBits"] == len(LINEAR)
    assert kernels["MatMul"] + kernels["FusedMatMul"] == 2  # attention: two activations


def test_session_tells_what_ran(encoder: Path, tmp_path: Path) -> None:
    axes = (Axis("batch", 1, 8), Axis("sequence", 1, 64))
    spec = TensorSpec("x", "float32", ("batch", "sequence", 32))
    signature = Signature((spec,), (TensorSpec("y", "float32", spec.shape),), axes)
    paths = {"fp32": encoder}
    for precision, bits in (("int4", 4), ("int8", 8)):
        paths[precision] = tmp_path / f"{precision}.onnx"
        quantize_weight_only(encoder, paths[precision], bits=bits)
    for given, path in paths.items():
        artifact = Artifact(path, "onnx", signature, InputContract())
        for asked, form in (("int4", None), ("int8", "weights")):
            session = get_target("onnxruntime-cpu").open(artifact, Variant("onnxruntime-cpu", asked, form), threads=1)
            told = session.executed()
            assert told["precision"] == (asked if given == asked else "fp32")
            bits = given.removeprefix("int")
            assert told["integer_weights"] == ({} if path == encoder else {f"MatMulNBits, {bits} bits": len(LINEAR)})


def test_kept_nodes_stay(encoder: Path, tmp_path: Path) -> None:
    record = quantize_weight_only(encoder, tmp_path / "a.onnx", bits=8, keep=["MatMul_q0"])
    assert [(entry["node"], entry["rule"]) for entry in record["kept"]] == [("MatMul_q0", "asked")]
    assert len(record["quantized"]) == len(LINEAR) - 1
    assert "wq" in stored(tmp_path / "a.onnx")


def test_a_weight_that_is_not_finite_is_not_hidden(encoder: Path, tmp_path: Path) -> None:
    model = onnx.load(encoder)
    for tensor in model.graph.initializer:
        if tensor.name == "wk":
            array = numpy_helper.to_array(tensor).copy()
            array[0, 0] = np.nan
            tensor.CopyFrom(numpy_helper.from_array(array, "wk"))
    onnx.save(model, tmp_path / "broken.onnx")
    record = quantize_weight_only(tmp_path / "broken.onnx", tmp_path / "a.onnx", bits=4)
    assert [entry["node"] for entry in record["kept"]] == ["MatMul_k0"]
    assert "not all of it is finite" in record["kept"][0]["why"]


def test_requests_that_cannot_be_met(encoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.onnx"
    with pytest.raises(RequestError, match="not in the graph"):
        quantize_weight_only(encoder, out, bits=4, keep=["nowhere"])
    with pytest.raises(NotApplicableError, match="nothing in the graph can be quantized"):
        quantize_weight_only(encoder, out, bits=4, keep=LINEAR)
    with pytest.raises(RequestError, match="so many bits"):
        quantize_weight_only(encoder, out, bits=2)
    assert not out.exists()


def test_same_input_same_bytes(encoder: Path, tmp_path: Path) -> None:
    for name in "ab":
        quantize_weight_only(encoder, tmp_path / f"{name}.onnx", bits=4)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
