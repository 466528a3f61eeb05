"""FP8 as Q/DQ pairs: how it rounds, what is written, and that ONNX Runtime computes the pairs as they stand."""

from __future__ import annotations

import ctypes
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from calibration.collect import collect
from calibration.quantize.products import observed
from calibration.quantize.qdq import SCHEMES, Scheme, quantize_static
from calibration.quantize.weights import quantize_weight, rounded
from calibration.table import CalibrationTable
from exporter.errors import NotApplicableError
from exporter.onnx_files import load_model
from exporter.targets.onnxruntime import INTEGER_KERNELS, kernels_that_run, open_cpu_session

from .conftest import batches, rms, run, weights
from .test_qdq import ATTENTION, CONVOLUTION, LINEAR, calibrated, constants, nodes

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
FP8 = SCHEMES["tensorrt-fp8"]


def every_number() -> np.ndarray:
    """All finite numbers of E4M3, ascending, as float32."""
    found = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
    return np.unique(found[np.isfinite(found)])


def hard_values() -> np.ndarray:
    """Every number, everything half-way between two with its neighbours, all float32 of 16 bits, and the ends."""
    numbers = every_number()
    halves = (numbers[1:] + numbers[:-1]) / 2
    short = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)
    ends = np.array([448, 448.1, 464, 464.1, 479.9, 480, 1e30, np.inf, -0.0, np.nan], np.float32)
    near = [np.nextafter(halves, np.float32(side), dtype=np.float32) for side in (-np.inf, np.inf)]
    return np.concatenate([numbers, halves, *near, short, ends, -ends]).astype(np.float32)


def test_it_rounds_to_the_nearest_and_ties_to_even() -> None:
    """Against a search among all numbers, which no library does."""
    numbers, values = every_number(), hard_values()
    values = values[np.isfinite(values)]
    above = np.clip(np.searchsorted(numbers, values), 1, len(numbers) - 1)
    low, high = numbers[above - 1].astype(np.float64), numbers[above].astype(np.float64)
    to_low, to_high = np.abs(values - low), np.abs(high - values)
    low_is_even = (numbers[above - 1].astype(E4M3).view(np.uint8) & 1) == 0
    nearest = np.where((to_low < to_high) | ((to_low == to_high) & low_is_even), low, high)
    np.testing.assert_array_equal(rounded(values, "fp8").astype(np.float64), nearest)


def test_onnx_runtime_rounds_to_the_same_bits() -> None:
    """What the check of the numbers runs is what the weights were rounded with."""
    values = hard_values()
    quantize = helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])
    graph = helper.make_graph(
        [quantize],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT8E4M3FN, [None])],
        [
            numpy_helper.from_array(np.array(1, np.float32), "scale"),
            helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run_with_ort_values(None, {"x": ort.OrtValue.ortvalue_from_numpy(values)})[0]
    with np.errstate(invalid="ignore"):
        mine = rounded(values, "fp8")
    bits = np.frombuffer(ctypes.string_at(found.data_ptr(), len(values)), np.uint8)  # NumPy has no such type
    known = ~np.isnan(values)  # a NaN's sign says nothing
    np.testing.assert_array_equal(bits[known], mine.view(np.uint8)[known])
    assert np.isnan(bits.view(E4M3)[~known].astype(np.float32)).all()
    assert np.isnan(mine[~known].astype(np.float32)).all()


def test_what_lies_beyond_becomes_the_largest() -> None:
    assert rounded(np.array([1e9, -1e9, np.inf, 449], np.float32), "fp8").astype(np.float32).tolist() == [
        448,
        -448,
        448,
        448,
    ]


def test_a_channel_of_zeros_and_one_of_the_smallest_numbers() -> None:
    weight = np.zeros((4, 3), np.float32)
    weight[:, 1], weight[:, 2] = 1e-44, [1, -2, 3, 4]
    for numbers in ("int8", "fp8"):
        made = quantize_weight(weight, 1, numbers)
        assert made.scales[0] == 1
        assert (made.scales > 0).all()
        restored = made.restored()
        assert np.isfinite(restored).all()
        assert not restored[:, 0].any()
        np.testing.assert_allclose(restored[:, 2], weight[:, 2], rtol=2**-4)
    assert quantize_weight(np.zeros((2, 2), np.float32), 1, "fp8").rms_relative == 0


def test_result_is_near_the_original(encoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "fp8.onnx"
    record = quantize_static(encoder, out, calibrated(encoder), FP8)
    assert sorted(entry["node"] for entry in record["quantized"]) == sorted([*LINEAR, *ATTENTION])
    assert record["kept"] == []
    for batch in batches(4, seed=8):
        error = rms(run(out, batch)[0], run(encoder, batch)[0])
        assert 1e-3 < error < 2**-3  # a number is off by 2^-4 at most, and several follow each other


def test_what_is_written(encoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "fp8.onnx"
    table = calibrated(encoder)
    quantize_static(encoder, out, table, FP8)
    model = onnx.load(out)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version >= 19
    assert model.ir_version >= 9
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    stored = constants(out)
    for kind in ("QuantizeLinear", "DequantizeLinear"):
        for node in nodes(out)[kind]:
            assert kinds[node.input[2]] == TensorProto.FLOAT8E4M3FN
            assert not stored[node.input[2]].astype(np.float32).any()
    assert kinds["wu_quantized"] == TensorProto.FLOAT8E4M3FN
    np.testing.assert_allclose(stored["wu_scale"], np.abs(weights()["wu"]).max(axis=0) / 448, rtol=1e-6)
    largest = max(-table.of("active").min, table.of("active").max)
    assert stored["active_scale"] == pytest.approx(largest / 448, rel=1e-6)
    assert "wu" not in stored
    assert any(name.endswith("_corrected") for name in stored)


@pytest.mark.parametrize("scheme", [SCHEMES["tensorrt"], FP8])
def test_pairs_are_computed_as_they_stand(scheme: Scheme, tmp_path: Path) -> None:
    """The session that looks at the numbers rounds where the graph says so, and nowhere else."""
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((64, 48)).astype(np.float32)
    text = '<ir_version: 9, opset_import: ["" : 20]> g (float[n, 64] x) => (float[n, 48] y) { y = MatMul (x, w) }'
    model = onnx.parser.parse_model(text)
    model.graph.node[0].name = "product"
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    path, out = tmp_path / "one.onnx", tmp_path / "quantized.onnx"
    onnx.save(model, path)
    inputs = [{"x": rng.standard_normal((7, 64)).astype(np.float32)} for _ in range(5)]
    quantize_static(path, out, collect(path, lambda: inputs, observed(load_model(path))), scheme)
    stored = constants(out)
    scale, kind = stored["x_scale"], scheme.weights
    unseen = np.concatenate([inputs[0]["x"], 3 * inputs[1]["x"]])  # some of it beyond the range
    activations = rounded(unseen / scale, kind).astype(np.float32) * scale
    if kind == "int8":  # ONNX has -128 as well
        activations = np.clip(np.round(unseen / scale), -128, 127).astype(np.float32) * scale
    expected = activations @ (stored["w_quantized"].astype(np.float32) * stored["w_scale"])
    session = open_cpu_session(out, 1, literal=True)
    np.testing.assert_allclose(session.run(None, {"x": unseen})[0], expected, rtol=1e-5, atol=1e-4)
    if kind == "int8":  # which would be fused otherwise
        assert INTEGER_KERNELS & set(kernels_that_run(out))


def test_convolutions_are_kept(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    made = {"kernel": (6, 3, 3, 3), "kernel_bias": (6,), "matrix": (5, 6), "bias": (5,)}
    model = onnx.parser.parse_model(CONVOLUTION)
    model.graph.initializer.extend(
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name) for name, shape in made.items()
    )
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
    path = tmp_path / "net.onnx"
    onnx.save(model, path)
    images = [{"image": rng.standard_normal((2, 3, 8, 8)).astype(np.float32)} for _ in range(6)]
    table = collect(path, lambda: images, observed(load_model(path)))
    record = quantize_static(path, tmp_path / "fp8.onnx", table, FP8)
    assert [entry["node"] for entry in record["quantized"]] == ["node_y"]
    assert [(entry["node"], entry["rule"]) for entry in record["kept"]] == [("node_c", "no_fp8_form")]


def test_input_that_never_changes_keeps_its_product(encoder: Path, tmp_path: Path) -> None:
    still = lambda: [{"x": np.ones((2, 5, 32), np.float32)}]  # noqa: E731 - layer norm of equal values is constant
    table = collect(encoder, still, observed(load_model(encoder)))
    kept = {e["node"]: e for e in quantize_static(encoder, tmp_path / "a.onnx", table, FP8)["kept"]}
    assert kept["MatMul_q0"]["rule"] == "constant_input"


def test_operators_older_than_fp8_are_refused(encoder: Path, tmp_path: Path) -> None:
    table = calibrated(encoder)
    model = onnx.load(encoder)
    model.opset_import[0].version = 18
    onnx.save(model, tmp_path / "old.onnx")
    with pytest.raises(NotApplicableError, match="opset 18") as caught:
        quantize_static(tmp_path / "old.onnx", tmp_path / "a.onnx", table, FP8)
    assert "export.opset=19" in str(caught.value)
    assert not (tmp_path / "a.onnx").exists()


def test_same_input_same_bytes(encoder: Path, tmp_path: Path) -> None:
    table: CalibrationTable = calibrated(encoder)
    for name in "ab":
        quantize_static(encoder, tmp_path / f"{name}.onnx", table, FP8)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
