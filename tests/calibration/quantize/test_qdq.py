"""Static Q/DQ forms: what is written, what it computes, and that OpenVINO really runs it on integers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from calibration.collect import collect
from calibration.quantize.products import observed, products
from calibration.quantize.qdq import SCHEMES, Scheme, quantize_static
from calibration.quantize.weights import quantize_weight
from calibration.table import CalibrationTable
from exporter.errors import NotApplicableError, RequestError
from exporter.onnx_files import load_model

from .conftest import batches, rms, run, weights

LINEAR = [f"MatMul_{name}0" for name in ("q", "k", "v", "o", "up", "down")]
ATTENTION = ["MatMul_scores", "MatMul_mixed"]


def calibrated(path: Path, *, histograms: bool = True) -> CalibrationTable:
    return collect(path, lambda: batches(), observed(load_model(path)), histograms=histograms)


def nodes(path: Path) -> dict[str, list[onnx.NodeProto]]:
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in onnx.load(path).graph.node:
        found.setdefault(node.op_type, []).append(node)
    return found


def constants(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def test_products_are_found(encoder: Path) -> None:
    assert sorted(str(n.name) for n in products(load_model(encoder))) == sorted([*LINEAR, *ATTENTION])
    assert sorted(str(n.name) for n in products(load_model(encoder), attention=False)) == sorted(LINEAR)
    assert observed(load_model(encoder), attention=False) == ["normed", "joined", "residual", "active"]


@pytest.mark.parametrize(
    "scheme", [SCHEMES["openvino-cpu"], SCHEMES["tensorrt"], Scheme("uint8", "percentile", attention=False)]
)
def test_result_is_near_the_original(encoder: Path, tmp_path: Path, scheme: Scheme) -> None:
    out = tmp_path / "int8.onnx"
    record = quantize_static(encoder, out, calibrated(encoder), scheme)
    wanted = [*LINEAR, *(ATTENTION if scheme.attention else [])]
    assert sorted(entry["node"] for entry in record["quantized"]) == sorted(wanted)
    assert record["kept"] == []
    for batch in batches(4, seed=8):
        error = rms(run(out, batch)[0], run(encoder, batch)[0])
        assert 1e-4 < error < 0.03


def test_weights_are_rounded_per_output_channel(encoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "int8.onnx"
    record = quantize_static(encoder, out, calibrated(encoder), SCHEMES["openvino-cpu"])
    stored, weight = constants(out), weights()["wu"]
    integers, scales = stored["wu_quantized"], stored["wu_scale"]
    assert integers.dtype == np.int8
    np.testing.assert_allclose(scales, np.abs(weight).max(axis=0) / 127, rtol=1e-6)
    assert np.abs(integers * scales - weight).max() <= scales.max() / 2 * 1.0001
    assert "wu" not in stored  # the float weight is gone
    entry = next(e for e in record["quantized"] if e["node"] == "MatMul_up0")
    lost = integers.astype(np.float64) * scales - weight
    assert entry["weight_rms_relative"] == pytest.approx(np.linalg.norm(lost) / np.linalg.norm(weight))


def test_activation_read_several_times_is_quantized_once(encoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "int8.onnx"
    quantize_static(encoder, out, calibrated(encoder), SCHEMES["openvino-cpu"])
    readers = [node for node in nodes(out)["QuantizeLinear"] if node.input[0] == "normed"]
    assert len(readers) == 1
    # The residual goes on in FP32 beside the integers.
    assert any("residual" in node.input for node in nodes(out)["Add"])


def test_tensorrt_gets_symmetric_int8(encoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "int8.onnx"
    quantize_static(encoder, out, calibrated(encoder), SCHEMES["tensorrt"])
    stored = constants(out)
    points = [stored[node.input[2]] for kind in ("QuantizeLinear", "DequantizeLinear") for node in nodes(out)[kind]]
    assert all(point.dtype == np.int8 and not point.any() for point in points)


def test_openvino_gets_asymmetric_uint8(encoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "int8.onnx"
    table = calibrated(encoder)
    quantize_static(encoder, out, table, Scheme("uint8", "minmax"))
    stored = constants(out)
    low, high = table.of("active").min, table.of("active").max
    assert stored["active_scale"] == pytest.approx((high - low) / 255, rel=1e-6)
    assert stored["active_zero_point"].dtype == np.uint8
    assert stored["active_zero_point"] == round(-low / ((high - low) / 255))


def test_ranges_alone_do(encoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "int8.onnx"
    quantize_static(encoder, out, calibrated(encoder, histograms=False), SCHEMES["openvino-cpu"])
    batch = next(batches())
    assert rms(run(out, batch)[0], run(encoder, batch)[0]) < 0.03


def test_bias_correction_centres_the_error_of_the_weights(encoder: Path, tmp_path: Path) -> None:
    """On the calibration data, the mean output of a layer is what it was before its weights were rounded."""
    table = calibrated(encoder)
    means = {}
    for corrected in (False, True):
        out = tmp_path / f"{corrected}.onnx"
        quantize_static(encoder, out, table, Scheme(attention=False, bias_correction=corrected), keep=[
            name for name in LINEAR if name != "MatMul_up0"
        ])  # fmt: skip
        bias = constants(out)["bu_corrected" if corrected else "bu"]
        weight = quantize_weight(weights()["wu"], 1).restored()
        inputs = np.concatenate([run(encoder, batch, "residual")[0].reshape(-1, 32) for batch in batches()])
        means[corrected] = (inputs @ weight + bias - inputs @ weights()["wu"] - weights()["bu"]).mean(axis=0)
    assert np.abs(means[True]).max() < 1e-5
    assert np.abs(means[False]).max() > 10 * np.abs(means[True]).max()


def test_kept_nodes_stay(encoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "int8.onnx"
    record = quantize_static(encoder, out, calibrated(encoder), SCHEMES["openvino-cpu"], keep=["MatMul_down0"])
    assert [(entry["node"], entry["rule"]) for entry in record["kept"]] == [("MatMul_down0", "asked")]
    assert "wd" in constants(out)


def test_unknown_node_to_keep(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="not in the graph"):
        quantize_static(encoder, tmp_path / "a.onnx", calibrated(encoder), Scheme(), keep=["MatMul_nowhere"])


def test_input_that_never_changes_keeps_its_product(encoder: Path, tmp_path: Path) -> None:
    still = lambda: [{"x": np.ones((2, 5, 32), np.float32)}]  # noqa: E731 - layer norm of equal values is constant
    table = collect(encoder, still, observed(load_model(encoder)))
    record = quantize_static(encoder, tmp_path / "a.onnx", table, SCHEMES["openvino-cpu"])
    kept = {entry["node"]: entry for entry in record["kept"]}
    assert kept["MatMul_q0"]["rule"] == "constant_input"
    assert "'normed' never changed" in kept["MatMul_q0"]["why"]


def test_nothing_to_quantize(encoder: Path, tmp_path: Path) -> None:
    keep = [*LINEAR, *ATTENTION]
    with pytest.raises(NotApplicableError, match="nothing in the graph can be quantized"):
        quantize_static(encoder, tmp_path / "a.onnx", calibrated(encoder), SCHEMES["openvino-cpu"], keep=keep)


def test_same_input_same_bytes(encoder: Path, tmp_path: Path) -> None:
    for name in "ab":
        quantize_static(encoder, tmp_path / f"{name}.onnx", calibrated(encoder), SCHEMES["openvino-cpu"])
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_openvino_runs_the_products_on_integers(encoder: Path, tmp_path: Path) -> None:
    from openvino import Core

    from exporter.targets.openvino import layer_precisions

    out = tmp_path / "int8.onnx"
    quantize_static(encoder, out, calibrated(encoder), SCHEMES["openvino-cpu"])
    compiled = Core().compile_model(str(out), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    layers = layer_precisions(compiled)
    assert layers["u8"] + layers["i8"] >= len(LINEAR)


def test_onnxruntime_takes_the_tensorrt_form(encoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "int8.onnx"
    quantize_static(encoder, out, calibrated(encoder), SCHEMES["tensorrt"])
    session = ort.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    assert np.isfinite(session.run(None, next(batches()))[0]).all()


CONVOLUTION = """
<ir_version: 9, opset_import: ["" : 20]>
g (float[batch, 3, 8, 8] image) => (float[batch, 5] y) {
  c = Conv <pads = [1, 1, 1, 1]> (image, kernel, kernel_bias)
  r = Relu (c)
  p = GlobalAveragePool (r)
  f = Flatten (p)
  y = Gemm <transB = 1> (f, matrix, bias)
}
"""


def test_convolutions_and_transposed_weights(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    made = {"kernel": (6, 3, 3, 3), "kernel_bias": (6,), "matrix": (5, 6), "bias": (5,)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in made.items()}
    model = onnx.parser.parse_model(CONVOLUTION)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
    onnx.save(model, tmp_path / "net.onnx")
    images = [{"image": rng.standard_normal((2, 3, 8, 8)).astype(np.float32)} for _ in range(6)]
    table = collect(tmp_path / "net.onnx", lambda: images, observed(load_model(tmp_path / "net.onnx")))
    out = tmp_path / "int8.onnx"
    record = quantize_static(tmp_path / "net.onnx", out, table, SCHEMES["openvino-cpu"])
    assert [entry["node"] for entry in record["quantized"]] == ["node_c", "node_y"]
    stored = constants(out)
    np.testing.assert_allclose(stored["kernel_scale"], np.abs(arrays["kernel"]).max(axis=(1, 2, 3)) / 127, rtol=1e-6)
    np.testing.assert_allclose(stored["matrix_scale"], np.abs(arrays["matrix"]).max(axis=1) / 127, rtol=1e-6)
    assert rms(run(out, images[0])[0], run(tmp_path / "net.onnx", images[0])[0]) < 0.03
