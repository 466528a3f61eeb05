"""Smoothed graphs: the factors against stored activations, the function kept, and what int8 loses with and without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calibration.collect import collect
from calibration.factors import ALPHAS
from calibration.quantize.dynamic import quantize_dynamic
from calibration.quantize.products import observed
from calibration.quantize.qdq import SCHEMES, quantize_static
from calibration.smooth import find_groups, smooth, smooth_file
from calibration.table import CalibrationTable
from exporter.errors import RequestError
from exporter.onnx_files import load_model
from exporter.targets.onnxruntime import kernels_that_run
from tests.calibration.quantize.conftest import rms, run

WIDTH, INNER = 16, 48
OUTLIER, LARGE = 3, 60.0
HEADER = '<ir_version: 9, opset_import: ["" : 20]>\n'
BLOCK = """
block (float[batch, sequence, 16] x) => (float[batch, sequence, 16] y, float[batch, sequence, 16] o) {
  normed = LayerNormalization <axis = -1> (x, gain, shift)
  q0 = MatMul (normed, wq)
  q = Add (q0, bq)
  k0 = MatMul (normed, wk)
  k = Add (k0, bk)
  v0 = MatMul (normed, wv)
  v = Add (bv, v0)
  kt = Transpose <perm = [0, 2, 1]> (k)
  scores = MatMul (q, kt)
  probabilities = Softmax <axis = -1> (scores)
  mixed = MatMul (probabilities, v)
  o0 = MatMul (mixed, wo)
  o = Add (o0, bo)
  residual = Add (o, x)
  second = LayerNormalization <axis = -1> (residual, gain, shift)
  up0 = MatMul (second, wu)
  up = Add (up0, bu)
  active = Gelu (up)
  down0 = MatMul (active, wd)
  down = Add (down0, bo)
  y = Add (down, second)
}
"""
LINEAR = ["q0", "k0", "v0", "o0", "up0", "down0"]


def weights(outlier: float = LARGE) -> dict[str, np.ndarray]:
    """Of `BLOCK`. The norms make one channel `outlier` times as large, and what multiplies it is as much smaller."""
    rng = np.random.default_rng(7)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32)

    made = {f"w{n}": matrix(WIDTH, WIDTH) for n in "qkvo"}
    made |= {f"b{n}": (rng.standard_normal(WIDTH) * 0.1).astype(np.float32) for n in "qkvo"}
    made |= {"wu": matrix(WIDTH, INNER), "bu": np.zeros(INNER, np.float32), "wd": matrix(INNER, WIDTH)}
    made |= {"gain": np.ones(WIDTH, np.float32), "shift": (rng.standard_normal(WIDTH) * 0.2).astype(np.float32)}
    for name in ("gain", "shift"):
        made[name][OUTLIER] *= outlier
    for name in ("wq", "wk", "wv", "wu"):
        made[name][OUTLIER] /= outlier
    return made


def save(path: Path, text: str, arrays: dict[str, np.ndarray]) -> Path:
    model = onnx.parser.parse_model(HEADER + text)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


@pytest.fixture
def block(tmp_path: Path) -> Path:
    return save(tmp_path / "block.onnx", BLOCK, weights())


def batches(count: int = 6, seed: int = 3) -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    for number in range(count):
        yield {"x": rng.standard_normal((1 + number % 3, 4 + number, WIDTH)).astype(np.float32)}


def calibrated(path: Path) -> CalibrationTable:
    return collect(path, lambda: batches(), observed(load_model(path)))


def smoothed(path: Path, out: Path, alpha: float | None = 0.5) -> dict[str, Any]:
    return smooth_file(path, out, calibrated(path), alpha=alpha, samples=batches())


def constants(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def how(record: dict[str, Any]) -> dict[str, str]:
    return {entry["activation"]: entry["how"] for group in record["groups"] for entry in group["activations"]}


@pytest.mark.parametrize("alpha", [0.5, 0.7])
def test_factors_are_those_of_the_stored_activations(block: Path, tmp_path: Path, alpha: float) -> None:
    record = smoothed(block, tmp_path / "smooth.onnx", alpha)
    before, after = constants(block), constants(tmp_path / "smooth.onnx")
    stored = {name: [run(block, batch, name)[0] for batch in batches()] for name in ("normed", "second")}
    for name, readers in {"normed": ["wq", "wk", "wv"], "second": ["wu"]}.items():
        largest = np.abs(np.concatenate([array.reshape(-1, WIDTH) for array in stored[name]])).max(axis=0)
        row = np.abs(np.concatenate([before[reader] for reader in readers], axis=1)).max(axis=1)
        factors = largest**alpha / row ** (1 - alpha)
        for reader in readers:  # one vector for all three
            np.testing.assert_allclose(after[f"{reader}_smooth"], before[reader] * factors[:, None], rtol=1e-4)
        entry = next(group for group in record["groups"] if group["activations"][0]["activation"] == name)
        assert entry["factor_min"] == pytest.approx(factors.min(), rel=1e-4)
        assert entry["factor_max"] == pytest.approx(factors.max(), rel=1e-4)
        if name == "normed":
            np.testing.assert_allclose(after["gain_smooth"], before["gain"] / factors, rtol=1e-4)
            np.testing.assert_allclose(after["shift_smooth"], before["shift"] / factors, rtol=1e-4)
        else:
            np.testing.assert_allclose(after["second_inverse"], 1 / factors, rtol=1e-4)


@pytest.mark.parametrize("alpha", [0.5, None])
def test_smoothed_graph_computes_the_same(block: Path, tmp_path: Path, alpha: float | None) -> None:
    out = tmp_path / "smooth.onnx"
    record = smoothed(block, out, alpha)
    assert 0 < record["rms_relative"] < 1e-6
    for batch in batches(5, seed=11):
        for name in ("y", "o"):
            assert rms(run(out, batch, name)[0], run(block, batch, name)[0]) < 1e-6


def test_folded_where_only_products_read_it_else_an_operator(block: Path, tmp_path: Path) -> None:
    out = tmp_path / "smooth.onnx"
    record = smoothed(block, out)
    found = how(record)
    assert found["normed"] == "folded"
    assert found["second"] == "inserted"  # a residual reads it as well
    entries = {entry["activation"]: entry for group in record["groups"] for entry in group["activations"]}
    assert entries["normed"]["into"] == ["node_normed"]
    assert "'node_y' (Add) reads 'second' too" in entries["second"]["why"]
    assert operators(out).count("Mul") == record["inserted"] == list(found.values()).count("inserted")
    read = {node.name: node.input[0] for node in onnx.load(out).graph.node}
    assert read["node_q0"] == read["node_k0"] == read["node_v0"] == "normed"
    assert read["node_up0"] == "second_smooth"
    assert {"gain", "shift"} <= set(constants(out))  # the second norm, which has the same, keeps them


def test_int8_of_outliers(block: Path, tmp_path: Path) -> None:
    """A channel of 60 times the size leaves the others four of 256 integers, and the smoothed graph does not."""
    out = tmp_path / "smooth.onnx"
    record = smoothed(block, out)
    assert max(group["factor_max"] for group in record["groups"]) > 5
    errors: dict[str, list[float]] = {}
    for name, path in {"plain": block, "smooth": out}.items():
        quantize_static(path, tmp_path / f"{name}.s.onnx", calibrated(path), SCHEMES["openvino-cpu"])
        quantize_static(path, tmp_path / f"{name}.t.onnx", calibrated(path), SCHEMES["tensorrt"])
        quantize_dynamic(path, tmp_path / f"{name}.d.onnx")
        for form in "std":
            errors[name + form] = [
                rms(run(tmp_path / f"{name}.{form}.onnx", batch, "o")[0], run(block, batch, "o")[0])
                for batch in batches(4, seed=8)
            ]
    for form in "std":
        assert np.mean(errors["plain" + form]) > 0.05
        assert np.mean(errors["smooth" + form]) < 0.3 * np.mean(errors["plain" + form])


def test_products_of_a_smoothed_graph_run_on_integers(block: Path, tmp_path: Path) -> None:
    from openvino import Core

    from exporter.targets.openvino import layer_precisions

    out = tmp_path / "smooth.onnx"
    smoothed(block, out)
    record = quantize_static(out, tmp_path / "static.onnx", calibrated(out), SCHEMES["openvino-cpu"])
    assert len(record["quantized"]) == len(LINEAR)
    compiled = Core().compile_model(str(tmp_path / "static.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    layers = layer_precisions(compiled)
    assert layers["u8"] + layers["i8"] >= len(LINEAR)
    quantize_dynamic(out, tmp_path / "dynamic.onnx")
    kernels = kernels_that_run(tmp_path / "dynamic.onnx")
    assert kernels["MatMulIntegerToFloat"] + kernels["DynamicQuantizeMatMul"] == len(LINEAR)


def test_each_group_may_have_an_alpha_of_its_own(block: Path) -> None:
    table = calibrated(block)
    free = smooth(load_model(block), table, None)
    assert free["alpha"] is None
    fixed = [smooth(load_model(block), table, alpha)["groups"] for alpha in ALPHAS]
    for group in free["groups"]:
        same = [other for groups in fixed for other in groups if other["products"] == group["products"]]
        assert group == min(same, key=lambda other: other["expected_error"])


def test_what_smoothing_would_make_worse_is_left_alone(tmp_path: Path) -> None:
    """Alike channels of rare large values: alpha 0.5 would make them as uneven as the weights' rows are."""
    text = "g (float[batch, sequence, 16] x) => (float[batch, sequence, 16] y) {\n y = MatMul (x, wq)\n}"
    array = weights(1.0)["wq"]
    array[5] *= 10
    path = save(tmp_path / "uneven.onnx", text, {"wq": array})
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(8):
        x = np.where(rng.random((4, 50, WIDTH)) < 0.02, 8.0, rng.standard_normal((4, 50, WIDTH)) / 2)
        rows.append({"x": x.astype(np.float32)})
    table = collect(path, lambda: rows, observed(load_model(path)))
    model = load_model(path)
    record = smooth(model, table)
    assert [(entry["node"], entry["rule"]) for entry in record["kept"]] == [("node_y", "no_gain")]
    assert "times the rounding error" in record["kept"][0]["why"]
    assert [node.op_type for node in model.graph] == ["MatMul"]
    assert not smooth_file(path, tmp_path / "smooth.onnx", table)["groups"]
    assert not (tmp_path / "smooth.onnx").exists()


def test_dead_channels(tmp_path: Path) -> None:
    arrays = weights()
    arrays["gain"][7] = arrays["shift"][7] = 0  # no activation
    for name in ("wq", "wk", "wv"):
        arrays[name][9] = 0  # no weight
    path = save(tmp_path / "dead.onnx", BLOCK, arrays)
    out = tmp_path / "smooth.onnx"
    smoothed(path, out)
    found = constants(out)
    assert all(np.isfinite(array).all() for array in found.values() if array.dtype == np.float32)
    np.testing.assert_array_equal(found["wq_smooth"][[7, 9]], arrays["wq"][[7, 9]])
    assert found["gain_smooth"][9] == arrays["gain"][9]
    batch = next(batches(1, seed=20))
    assert rms(run(out, batch)[0], run(path, batch)[0]) < 1e-6


def test_activation_that_never_changes_is_left_alone(tmp_path: Path) -> None:
    text = """
    g (float[batch, sequence, 16] x) => (float[batch, sequence, 16] y) {
      still = Mul (x, nothing)
      a = MatMul (still, wq)
      b = MatMul (x, wk)
      y = Add (a, b)
    }
    """
    arrays = {name: weights()[name] for name in ("wq", "wk")} | {"nothing": np.zeros((), np.float32)}
    path = save(tmp_path / "g.onnx", text, arrays)
    learned = [{"x": batch["x"] * np.where(np.arange(16) == OUTLIER, 60, 1).astype(np.float32)} for batch in batches()]
    table = collect(path, lambda: learned, observed(load_model(path)))
    record = smooth_file(path, tmp_path / "smooth.onnx", table, samples=learned)
    assert [(entry["node"], entry["rule"]) for entry in record["kept"]] == [("node_a", "constant_input")]
    assert how(record) == {"x": "inserted"}


def test_channels_that_calibration_does_not_know(tmp_path: Path) -> None:
    """The last axis of the input is dynamic: one range is all that is known of it."""
    text = "g (float[batch, width] x) => (float[batch, 16] y) {\n y = MatMul (x, wq)\n}"
    path = save(tmp_path / "g.onnx", text, {"wq": weights()["wq"]})
    rows = [{"x": batch["x"][0]} for batch in batches()]
    table = collect(path, lambda: rows, observed(load_model(path)))
    assert [entry.rule for entry in find_groups(load_model(path), table)[1]] == ["no_channels"]
    assert not smooth_file(path, tmp_path / "smooth.onnx", table)["groups"]


def test_a_weight_of_several_products_stays_stored_once(tmp_path: Path) -> None:
    """Both activations are then divided by the same factors, as the layers of ALBERT have one set of weights."""
    text = """
    g (float[batch, sequence, 16] x) => (float[batch, sequence, 16] y) {
      a = LayerNormalization (x, gain, shift)
      b = MatMul (a, wq)
      c = LayerNormalization (b, gain, shift)
      y = MatMul (c, wq)
    }
    """
    arrays = {name: weights()[name] for name in ("gain", "shift", "wq")}
    path = save(tmp_path / "g.onnx", text, arrays)
    record = smoothed(path, tmp_path / "smooth.onnx")
    assert [group["products"] for group in record["groups"]] == [["node_b", "node_y"]]
    assert how(record) == {"a": "folded", "c": "folded"}
    assert set(constants(tmp_path / "smooth.onnx")) == {"gain_smooth", "shift_smooth", "wq_smooth"}
    assert record["rms_relative"] < 1e-6


def test_table_of_another_graph(block: Path, tmp_path: Path) -> None:
    table = collect(block, lambda: batches(), ["normed"])
    with pytest.raises(RequestError, match="no such tensor"):
        smooth_file(block, tmp_path / "smooth.onnx", table)


def test_same_input_same_bytes(block: Path, tmp_path: Path) -> None:
    for name in "ab":
        smoothed(block, tmp_path / f"{name}.onnx", None)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
