"""Query, key and value out of one product: written apart where TensorRT would lose their integers otherwise."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calibration.collect import collect
from calibration.quantize.products import observed
from calibration.quantize.qdq import SCHEMES, quantize_static
from exporter.onnx_files import load_model
from exporter.targets.tensorrt_builder import RTX, EngineOptions, build_engine
from tests.exporter.targets.tensorrt_graphs import needs_rtx

from .conftest import rms, run

WIDTH, HEADS = 32, 4
ATTENTION = """
  kt = Transpose <perm = [0, 1, 3, 2]> (k)
  scores = MatMul (q, kt)
  probabilities = Softmax <axis = -1> (scores)
  mixed = MatMul (probabilities, v)
  back = Transpose <perm = [0, 2, 1, 3]> (mixed)
  joined = Reshape (back, flat)
  y = MatMul (joined, wo)
"""
TAKEN_APART = {
    "slices": """
  view = Reshape (packed, dims)
  q0 = Slice (view, i0, i1, axis)
  k0 = Slice (view, i1, i2, axis)
  v0 = Slice (view, i2, i3, axis)
  q1 = Squeeze (q0, axis)
  k1 = Squeeze (k0, axis)
  v1 = Squeeze (v0, axis)
  q = Transpose <perm = [0, 2, 1, 3]> (q1)
  k = Transpose <perm = [0, 2, 1, 3]> (k1)
  v = Transpose <perm = [0, 2, 1, 3]> (v1)""",
    "permuted": """
  view = Reshape (packed, dims)
  turned = Transpose <perm = [2, 0, 3, 1, 4]> (view)
  q = Gather <axis = 0> (turned, zero)
  k = Gather <axis = 0> (turned, one)
  v = Gather <axis = 0> (turned, two)""",
}
"""What exporters make of ``view(…, 3, heads, size).unbind(2)``, as in ModernBERT, and of a permutation before it."""
BIASES = {"plain": "packed = MatMul (x, w)", "bias": "raw = MatMul (x, w)\n  packed = Add (raw, b)"}


def write(path: Path, how: str, bias: str) -> Path:
    rng = np.random.default_rng(1)
    text = f"""
<ir_version: 9, opset_import: ["" : 20]>
packed (float[batch, sequence, {WIDTH}] x) => (float[batch, sequence, {WIDTH}] y) {{
  {BIASES[bias]}{TAKEN_APART[how]}{ATTENTION}}}
"""
    model = onnx.parser.parse_model(text)
    arrays = {
        "w": (rng.standard_normal((WIDTH, 3 * WIDTH)) / 6).astype(np.float32),
        "b": rng.standard_normal(3 * WIDTH).astype(np.float32),
        "wo": (rng.standard_normal((WIDTH, WIDTH)) / 6).astype(np.float32),
        "dims": np.array([0, 0, 3, HEADS, WIDTH // HEADS]),
        "flat": np.array([0, 0, WIDTH]),
        "axis": np.array([2]),
        **{f"i{number}": np.array([number]) for number in range(4)},
        **{name: np.array(number) for number, name in enumerate(("zero", "one", "two"))},
    }
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in arrays.items() if name in used
    )
    for node in model.graph.node:
        node.name = f"layer/{node.op_type}_{node.output[0]}"
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def batches() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(2)
    return [{"x": rng.standard_normal((2, 5 + number, WIDTH)).astype(np.float32)} for number in range(4)]


def quantized(folder: Path, how: str, bias: str, scheme: str, keep: tuple[str, ...] = ()) -> tuple[Path, Path]:
    plain = write(folder / "plain.onnx", how, bias)
    table = collect(plain, batches, observed(load_model(plain)))
    out = folder / "quantized.onnx"
    quantize_static(plain, out, table, SCHEMES[scheme], keep=keep)
    return plain, out


def products(path: Path) -> Counter[str]:
    return Counter(node.name.partition("_part")[0] for node in onnx.load(path).graph.node if node.op_type == "MatMul")


@pytest.mark.parametrize("how", list(TAKEN_APART))
@pytest.mark.parametrize("bias", list(BIASES))
def test_it_is_written_as_three_with_the_same_numbers(tmp_path: Path, how: str, bias: str) -> None:
    plain, out = quantized(tmp_path, how, bias, "tensorrt")
    name = f"layer/MatMul_{'packed' if bias == 'plain' else 'raw'}"
    assert products(out) == {**products(plain), name: 3}
    onnx.checker.check_model(onnx.load(out), full_check=True)
    for batch in batches():
        assert 1e-4 < rms(run(out, batch)[0], run(plain, batch)[0]) < 0.05
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(out).graph.initializer}
    scales = [stored[f"w_scale_part{number}"] for number in range(3)]
    weight = numpy_helper.to_array(next(t for t in onnx.load(plain).graph.initializer if t.name == "w"))
    np.testing.assert_allclose(np.concatenate(scales), np.abs(weight).max(axis=0) / 127, rtol=0.5)
    parts = [stored[f"w_quantized_part{number}"] * scales[number] for number in range(3)]
    assert np.abs(np.concatenate(parts, axis=1) - weight).max() <= np.concatenate(scales).max()


def test_it_stays_one_where_nobody_gains(tmp_path: Path) -> None:
    """OpenVINO takes the packed product as it is; one that is kept in FP32 has no pair to lose."""
    plain, out = quantized(tmp_path, "slices", "plain", "openvino-cpu")
    assert products(out) == products(plain)
    plain, out = quantized(tmp_path, "slices", "plain", "tensorrt", keep=("layer/MatMul_packed",))
    assert products(out) == products(plain)


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("how", list(TAKEN_APART))
@pytest.mark.parametrize("bias", list(BIASES))
@pytest.mark.parametrize(("scheme", "kind"), [("tensorrt", "Int8"), ("tensorrt-fp8", "FP8")])
def test_tensorrt_multiplies_integers(tmp_path: Path, how: str, bias: str, scheme: str, kind: str) -> None:
    _, out = quantized(tmp_path, how, bias, scheme)
    profile = {"x": ((1, 1, WIDTH), (2, 16, WIDTH), (4, 32, WIDTH))}
    for gpu in ("SM89", "SM120"):
        options = EngineOptions(compute_capabilities=(gpu,))
        built = build_engine(out, tmp_path / "plan", module=RTX, profiles=[profile], options=options)
        assert {layer.product for layer in built.layers} - {None} == {kind}
