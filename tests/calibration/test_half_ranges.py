"""Ranges for half forms, against the activations themselves, and planted overflows that only they find."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from calibration.half_ranges import collect_half_ranges, load_half_ranges
from exporter.artifact import InputContract
from exporter.errors import RequestError
from exporter.precision.emulate import emulate_half
from exporter.precision.half import convert

RNG = np.random.default_rng(1)
Batches = Sequence[dict[str, np.ndarray]]
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def write(text: str, *, opset: int = 20, **weights: np.ndarray) -> Path:
        model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : {opset}]>\n{text}')
        model.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in weights.items())
        for node in model.graph.node:
            node.name = node.output[0]
        onnx.checker.check_model(model)
        onnx.save(model, tmp_path / "model.onnx")
        return tmp_path / "model.onnx"

    return write


def run(path: Path, batch: dict[str, np.ndarray]) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    result: np.ndarray = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, batch)[
        0
    ]
    return result


def half(
    model: Path, batches: Batches, *, measured: Batches | None, precision: str = "fp16", **options: Any
) -> dict[str, Any]:
    """The record of a conversion with what some batches show or without, and the worst RMS error of artifact and
    emulation over others (NaN and Inf count as infinite)."""
    ranges = None if measured is None else collect_half_ranges(model, measured).ranges
    out, emulation = model.with_name("half.onnx"), model.with_name("emulation.onnx")
    contract = options.pop("contract", InputContract())
    record = convert(model, out, precision=precision, contract=contract, ranges=ranges, **options)  # type: ignore[arg-type]
    emulate_half(out, emulation, precision=precision)  # type: ignore[arg-type]
    errors = []
    for path in (out, emulation) if precision == "fp16" else (emulation,):  # ONNX Runtime has no BF16 on a CPU
        for batch in batches:
            expected, found = run(model, batch), run(path, batch)
            error = np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30)
            errors.append(float(error) if np.isfinite(found).all() else float("inf"))
    return record | {"error": max(errors)}


def kept(record: dict[str, Any]) -> dict[str, str]:
    return {d["node"]: d["rule"] for d in record["kept"]}


def why(record: dict[str, Any], node: str) -> str:
    return str(next(d["why"] for d in record["kept"] if d["node"] == node))


def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (RNG.standard_normal(shape) * scale).astype(np.float32)


TEXT = """
g (float[batch, sequence, 8] x, int64[batch] n) => (float[batch, sequence, 8] y) {
  tiny = Mul (x, small)
  turned = Transpose <perm = [0, 2, 1]> (tiny)
  scores = MatMul (x, turned)
  whole = Cast <to = 1> (n)
  y = Relu (x)
}
"""


def test_ranges_are_those_of_the_stored_activations(save: Save) -> None:
    model = save(TEXT, small=np.float32(1e-5))
    batches = [{"x": normal(2, 3 + i, 8, scale=1 + i), "n": np.array([5, 300 * i])} for i in range(5)]
    found = collect_half_ranges(model, batches)
    assert (found.samples, found.batches, found.notes) == (10, 5, ())
    assert set(found.ranges) == {"x", "tiny", "turned", "scores", "whole", "y"}
    tiny = [batch["x"] * np.float32(1e-5) for batch in batches]
    stored = {
        "x": [b["x"] for b in batches],
        "tiny": tiny,
        "turned": tiny,
        "scores": [b["x"] @ t.transpose(0, 2, 1) for b, t in zip(batches, tiny, strict=True)],
        "whole": [b["n"].astype(np.float32) for b in batches],
        "y": [np.maximum(b["x"], 0) for b in batches],
    }
    for name, arrays in stored.items():
        values = np.abs(np.concatenate([a.ravel() for a in arrays]))
        entry = found.ranges[name]
        assert entry.low == pytest.approx(min(a.min() for a in arrays), rel=1e-5)
        assert entry.high == pytest.approx(max(a.max() for a in arrays), rel=1e-5)
        nonzero = values[values > 0]
        assert entry.subnormal == pytest.approx((nonzero < 2**-14).mean(), abs=1e-3)
        assert entry.flushed == pytest.approx((nonzero.astype(np.float16) == 0).mean(), abs=1e-3)
        assert entry.subnormal_weight == pytest.approx(values[values < 2**-14].sum() / values.sum(), abs=1e-3)
    assert found.ranges["tiny"].subnormal > 0.5
    assert found.ranges["turned"].shape == (2, 8, 7)
    assert found.ranges["scores"].shape == (2, 7, 7)


def test_what_becomes_zero_is_what_rounding_makes_zero(save: Save) -> None:
    edge = np.float32(2.0**-25)
    x = np.array([[np.nextafter(edge, np.float32(0)), edge, np.nextafter(edge, np.float32(1)), 0.0]], np.float32)
    model = save("g (float[n, 4] x) => (float[n, 4] y) { y = Relu (x) }", opset=11)
    found = collect_half_ranges(model, [{"x": x}]).ranges["y"]
    assert found.flushed == pytest.approx(2 / 3)
    assert (x.astype(np.float16) == 0).tolist() == [[True, True, False, True]]


def test_ranges_survive_the_disk(save: Save, tmp_path: Path) -> None:
    batches = [{"x": normal(1, 4, 8), "n": np.array([1])}]
    found = collect_half_ranges(save(TEXT, small=np.float32(1e-5)), batches)
    found.save(tmp_path / "ranges.json")
    assert load_half_ranges(tmp_path / "ranges.json") == found
    for text in ("", "[]", "{}", '{"schema_version": 99}'):
        (tmp_path / "ranges.json").write_text(text)
        with pytest.raises(RequestError, match="measured ranges"):
            load_half_ranges(tmp_path / "ranges.json")


def test_no_samples(save: Save) -> None:
    with pytest.raises(RequestError, match="no calibration samples"):
        collect_half_ranges(save(TEXT, small=np.float32(1)), [])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_output_that_is_not_finite_names_tensor_and_sample(save: Save, value: float) -> None:
    model = save("g (float[n, 8] x) => (float[n, 8] y) { h = MatMul (x, w)  y = Identity (h) }", w=normal(8, 8))
    batches = [{"x": normal(3, 8)} for _ in range(3)]
    batches[1]["x"][2, 3] = value
    with pytest.raises(RequestError) as caught:
        collect_half_ranges(model, batches)
    assert str(caught.value.value) == "tensor 'x', calibration sample 5"


def test_infinities_that_the_model_deals_with_are_noted_and_stay_fp32(save: Save) -> None:
    text = "g (float[n, 8] x) => (float[n, 8] y) { h = MatMul (x, w)  e = Exp (h)  f = Add (e, one)  y = Div (one, f) }"
    model = save(text, w=np.eye(8, dtype=np.float32), one=np.float32(1))
    batches = [{"x": normal(2, 8)}, {"x": np.full((2, 8), 100, np.float32)}]  # a sigmoid that ends at zero
    found = collect_half_ranges(model, batches)
    assert found.notes == tuple(f"{name} was NaN or infinite, first in the batch of sample 2" for name in "ef")
    record = half(model, batches, measured=batches)
    assert kept(record) == {"e": "measured_range", "f": "measured_range", "y": "measured_range"}
    assert record["error"] < 1e-3


def test_a_tensor_without_elements_has_no_range(save: Save) -> None:
    text = "g (float[n, 8] x) => (float[n, 8] y) { none = Slice (x, zero, zero)  y = Concat <axis = 0> (x, none) }"
    found = collect_half_ranges(save(text, zero=np.array([0])), [{"x": normal(2, 8)}])
    assert (found.ranges["none"].low, found.ranges["none"].high) == (0.0, 0.0)


def test_values_inside_control_flow_are_not_measured(save: Save) -> None:
    text = """g (float[n, 8] x, bool c) => (float[n, 8] y) {
      y = If (c) <then_branch = a () => (float[n, 8] t) { t = Relu (x) },
                  else_branch = b () => (float[n, 8] e) { e = Exp (x) }>
    }"""
    found = collect_half_ranges(save(text), [{"x": normal(2, 8), "c": np.array(True)}])
    assert set(found.ranges) == {"x", "y"}


def wide(size: int, factor: float) -> np.ndarray:
    """A weight that makes `factor` times as large values."""
    return normal(size, size, scale=factor / size**0.5)


LAYER_NORMS = """g (float[n, 64] x) => (float[n, 64] y) {
  a = MatMul (x, w)
  calm = LayerNormalization (a, gain, shift)
  b = MatMul (calm, loud)
  planted = LayerNormalization (b, gain, shift)
  c = MatMul (planted, w)
  last = LayerNormalization (c, gain, shift)
  y = MatMul (last, w)
}"""


def test_the_layer_norm_whose_variance_exceeds_fp16_is_the_one_that_stays(save: Save) -> None:
    gain, shift = np.ones(64, np.float32), np.zeros(64, np.float32)
    model = save(LAYER_NORMS, w=wide(64, 1), loud=wide(64, 400), gain=gain, shift=shift)
    batches = [{"x": normal(5, 64)} for _ in range(4)]
    record = half(model, batches, measured=batches)
    reached = collect_half_ranges(model, batches).ranges["b"].largest
    assert kept(record) == {"planted": "normalization"}
    assert 400**2 > 65504 > 4 * reached  # the values themselves fit
    assert why(record, "planted").startswith(f"b reached {reached:.4g}, whose square {reached**2:.4g} leaves fp16")
    assert record["kept"][0]["figures"]["largest_square"] == reached**2
    assert {d["node"] for d in record["cleared"]} == {"calm", "last"}
    assert record["error"] < 3e-3
    # Without data all of them stay, and nothing says which one matters.
    assert kept(half(model, batches, measured=None)) == dict.fromkeys(("calm", "planted", "last"), "normalization")
    # BF16 holds the square: there it is the depth that keeps them, 64 elements where 4 squared are borne.
    record = half(model, batches, measured=batches, precision="bf16")
    assert set(kept(record)) == {"calm", "planted", "last"}
    assert "sum 64 elements, beyond the 16 that bf16 bears" in why(record, "calm")


def test_a_variance_written_out_stays_where_it_exceeds_fp16(save: Save) -> None:
    text = """g (float[n, 16] x) => (float[n, 16] y) {
      h = MatMul (x, w)
      mean = ReduceMean (h, last)
      centred = Sub (h, mean)
      square = Mul (centred, centred)
      variance = ReduceMean (square, last)
      safe = Add (variance, eps)
      deviation = Sqrt (safe)
      scaled = Div (centred, deviation)
      y = MatMul (scaled, w)
    }"""
    constants = {"last": np.array([-1]), "eps": np.float32(1e-3)}
    batches = [{"x": normal(6, 16)} for _ in range(3)]
    loud = save(text, w=wide(16, 500), **constants)
    planted = dict.fromkeys(("square", "variance", "safe", "deviation"), "measured_range")
    mean = {"mean": "reduction", "centred": "statistics", "scaled": "statistics"}
    record = half(loud, batches, measured=batches)
    assert kept(record) == planted | mean
    assert why(record, "mean").startswith("16 values of up to")
    assert "square reached" in why(record, "square")
    assert record["error"] < 3e-3
    # With no rules at all this is what is at stake.
    assert half(loud, batches, measured=None, rules=[])["error"] > 0.9  # an infinite variance leaves zeros
    quiet = save(text, w=wide(16, 1), **constants)
    record = half(quiet, batches, measured=batches)
    assert kept(record) == {}
    assert record["error"] < 3e-3
    assert set(kept(half(quiet, batches, measured=None))) >= {"square", "variance", "scaled"}


ATTENTION = """g (float[n, 12, 64] x) => (float[n, 12, 64] y) {
  q = MatMul (x, wq)
  k = MatMul (x, wk)
  v = MatMul (x, wv)
  turned = Transpose <perm = [0, 2, 1]> (k)
  scores = MatMul (q, turned)
  scaled = Mul (scores, scale)
  p = Softmax (scaled)
  mixed = MatMul (p, v)
  y = MatMul (mixed, wv)
}"""


def test_an_attention_score_beyond_fp16_is_found_and_named(save: Save) -> None:
    wq, wk, wv = wide(64, 80), wide(64, 80), wide(64, 1)
    batches = [{"x": normal(3, 12, 64)} for _ in range(3)]
    largest = max(float(np.abs((b["x"] @ wq) @ (b["x"] @ wk).transpose(0, 2, 1)).max()) for b in batches)
    assert largest > 65504
    model = save(ATTENTION, wq=wq, wk=wk, wv=wv, scale=np.float32(2.0 / largest))
    record = half(model, batches, measured=batches)
    assert kept(record) == {"scores": "measured_range", "scaled": "measured_range"}
    assert why(record, "scores") == f"scores reached {largest:.4g}, beyond fp16 with margin 4"
    assert record["kept"][0]["figures"]["largest_abs"] == pytest.approx(largest, rel=1e-4)
    assert record["error"] < 3e-3
    # The fixed rules look at operators: they keep the softmax, and the product before it overflows.
    blind = half(model, batches, measured=None)
    assert "scores" not in kept(blind)
    assert blind["error"] == float("inf")


@pytest.mark.parametrize("left_out", [(), ("softmax", "softmax_input")])
def test_an_additive_mask_of_a_billion(save: Save, left_out: tuple[str, ...]) -> None:
    """It is named as a constant, not as a range; where its softmax is half it is clamped, whatever was measured."""
    from exporter.precision.rules import rules

    text = """g (float[n, 64, 64] x, bool[n, 1, 64] m) => (float[n, 64, 64] y) {
      s = MatMul (x, w)
      bias = Where (m, zero, low)
      masked = Add (s, bias)
      p = Softmax (masked)
      y = MatMul (p, w)
    }"""
    model = save(text, w=wide(64, 1), zero=np.float32(0), low=np.float32(-1e9))
    m = np.ones((2, 1, 64), bool)
    m[1, 0, 20:] = False
    batches = [{"x": normal(2, 64, 64), "m": m}]
    promise = InputContract(attends=True)
    names = [name for name in rules() if name not in left_out]
    record = half(model, batches, measured=batches, contract=promise, rules=names)
    assert collect_half_ranges(model, batches).ranges["masked"].low == pytest.approx(-1e9)
    if left_out:
        assert kept(record) == {}
        assert [c["constant"] for c in record["constants"]["changed"]] == ["low"]
    else:
        assert kept(record) == {"bias": "constant_range", "masked": "constant_range", "p": "softmax"}
        assert why(record, "bias") == "low holds 1e+09, beyond fp16"
    assert record["error"] < 3e-3


def test_a_tensor_of_mostly_subnormal_values(save: Save) -> None:
    text = """g (float[n, 32] x) => (float[n, 32] y) {
      h = MatMul (x, w)
      tiny = MatMul (h, little)
      large = MatMul (tiny, much)
      y = MatMul (large, w)
    }"""
    model = save(text, w=wide(32, 1), little=wide(32, 1e-3), much=wide(32, 1e3))
    batches = [{"x": normal(4, 32, scale=1e-3)} for _ in range(3)]
    record = half(model, batches, measured=batches)
    assert kept(record) == {"tiny": "subnormal", "large": "subnormal"}
    found = collect_half_ranges(model, batches).ranges["tiny"]
    assert found.subnormal > 0.99
    assert f"{found.subnormal:.1%} of tiny's non-zero values lie below fp16's normal range" in why(record, "tiny")
    assert record["error"] < 3e-3
    blind = half(model, batches, measured=None)
    assert kept(blind) == {}
    assert blind["error"] > 5 * record["error"]
    assert kept(half(model, batches, measured=batches, precision="bf16")) == {}


def test_inputs_that_were_not_seen_have_the_margin(save: Save) -> None:
    wq = wide(64, 15)  # and keys that are the queries: the largest score is that of a token with itself, and positive
    model = save(ATTENTION, wq=wq, wk=wq, wv=wide(64, 1), scale=np.float32(1e-4))
    seen = [{"x": normal(3, 12, 64)} for _ in range(3)]
    largest = collect_half_ranges(model, seen).ranges["scores"].largest
    assert 65504 / 4 < largest < 65504
    unseen = [{"x": seen[0]["x"] * np.float32((2 * 65504 / largest) ** 0.5)}]  # scores twice as large as FP16 holds
    assert half(model, unseen, measured=seen)["error"] < 0.1
    assert half(model, unseen, measured=seen, margin=1.0)["error"] == float("inf")
