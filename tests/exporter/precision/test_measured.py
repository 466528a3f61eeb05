"""What measured ranges change in the rules: each case has a twin in which the figure is harmless."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from exporter.artifact import InputContract
from exporter.errors import RequestError
from exporter.precision.half import convert
from exporter.precision.ranges import Range

from .conftest import Writer, kept

RNG = np.random.default_rng(5)
W = RNG.standard_normal((8, 8)).astype(np.float32)
QUIET = Range(-2.0, 2.0)


def converted(write: Writer, text: str, ranges: dict[str, Range], precision: str = "fp16", **weights: Any) -> Any:
    opset = weights.pop("opset", 20)
    path = write(text, opset=opset, **weights)
    out = path.with_name("half.onnx")
    record = convert(path, out, precision=precision, contract=InputContract(), ranges=ranges)  # type: ignore[arg-type]
    json.dumps(record, allow_nan=False)
    return record


def cleared(record: dict[str, Any]) -> dict[str, str]:
    return {d["node"]: d["rule"] for d in record["cleared"]}


def around(line: str) -> str:
    """A graph that multiplies before and after `line`, which makes ``b`` of ``a``."""
    return f"agraph (float[n, 8] x) => (float[n, 8] y) {{ a = MatMul(x, w)  {line}  y = MatMul(b, w) }}"


def test_an_exponential_by_its_argument(write: Writer) -> None:
    text = around("b = Exp(a)")
    for reached, precision, expected in (
        (3.0, "fp16", {}),
        (5.0, "fp16", {"exp1": "steep_function"}),
        (3.0, "bf16", {"exp1": "steep_function"}),
        (0.4, "bf16", {}),
    ):
        record = converted(write, text, {"x": QUIET, "a": Range(-reached, 0.3), "b": QUIET}, precision, w=W)
        assert kept(record) == expected
        assert cleared(record) == ({} if expected else {"exp1": "steep_function"})
        found = (record["kept"] or record["cleared"])[0]
        assert f"a reached {reached:.4g}" in found["why"]
        assert found["figures"]["condition"] == reached


@pytest.mark.parametrize(
    ("divisor", "expected"),
    [
        (Range(0.5, 9.0), {}),
        (Range(-9.0, -0.5), {}),
        (Range(1e-4, 9.0), {"div2": "division"}),
        (Range(-1.0, 9.0), {"div2": "division"}),
    ],
)
def test_a_divisor_by_how_close_it_came_to_zero(write: Writer, divisor: Range, expected: dict[str, str]) -> None:
    record = converted(write, around("c = MatMul(x, w)  b = Div(a, c)"), {"a": QUIET, "c": divisor}, w=W)
    assert kept(record) == expected
    assert bool(cleared(record)) is not bool(expected)


def test_a_softmax_by_depth_and_scores(write: Writer) -> None:
    text = around("b = Softmax(a)")
    assert kept(converted(write, text, {"a": Range(-3.0, 3.0)}, w=W)) == {}
    record = converted(write, text, {"a": Range(-30.0, 3.0)}, w=W)
    assert kept(record) == {"softmax1": "softmax"}
    assert record["kept"][0]["why"] == "its scores reached 30, where rounding moves a weight by 0.015"
    record = converted(write, text, {"a": Range(-3.0, 3.0)}, "bf16", w=W)
    assert kept(record) == {"softmax1": "softmax"}
    assert "8 exponentials, more than 4" in record["kept"][0]["why"]
    free = "agraph (float[n, s] x) => (float[n, s] y) { y = Softmax(x) }"
    record = converted(write, free, {"x": Range(-3.0, 3.0, shape=(4, 77))})
    assert "not fixed (77 seen); its scores reached 3" in record["kept"][0]["why"]


def test_a_short_mean_by_what_adds_up_inside(write: Writer) -> None:
    text = """agraph (float[n, 8] x) => (float[n, 8] y) {
        a = MatMul(x, w)  m = ReduceMean(a, last)  b = Mul(a, m)  y = MatMul(b, w) }"""
    for reached, rule in ((900.0, None), (3000.0, "reduction")):  # 8 * 3000 * 4 > 65504
        record = converted(write, text, {"a": Range(-1.0, reached), "m": QUIET}, w=W, last=np.array([-1]))
        assert kept(record).get("reducemean1") == rule
    assert record["kept"][0]["figures"]["largest_sum"] == 24000.0


def test_depth_is_what_a_half_type_bears(write: Writer) -> None:
    text = """agraph (float[n, 8] x) => (float[n, 8] y) {
        a = MatMul(x, w)  m = ReduceMean(a, last)  b = Mul(a, m)  y = MatMul(b, w) }"""
    for ranges in ({}, {"a": QUIET}):
        assert "reducemean1" not in kept(converted(write, text, ranges, "fp16", w=W, last=np.array([-1])))
        record = converted(write, text, ranges, "bf16", w=W, last=np.array([-1]))
        assert kept(record)["reducemean1"] == "reduction"


def test_scores_inside_an_attention_operator(write: Writer) -> None:
    text = (
        """agraph (float[n, 2, s, 16] q, float[n, 2, s, 16] k) => (float[n, 2, s, 16] y) { y = Attention(q, k, k) }"""
    )
    for reached, expected in ((30.0, {}), (300.0, {"attention0": "attention_scores"})):
        record = converted(write, text, {"q": Range(-reached, 1.0), "k": Range(0.0, reached)}, opset=23)
        assert kept(record) == expected
    assert record["kept"][0]["figures"]["bound"] == 300.0 * 300.0 * 16 * 0.25


def test_a_reach_is_told_apart_from_a_mask(write: Writer) -> None:
    """What -1e9 puts into the scores is the constant's doing; what is large besides is not."""
    text = """agraph (float[n, 8] x, bool[n, 8] m) => (float[n, 8] y) {
        s = MatMul(x, w)  b = Where(m, zero, low)  a = Add(s, b)  p = Softmax(a)  y = MatMul(p, w) }"""
    masked = {"b": Range(-1e9, 0.0), "a": Range(-1e9, 3.0), "x": QUIET, "p": Range(0.0, 1.0)}
    weights = {"w": W, "zero": np.float32(0), "low": np.float32(-1e9)}
    record = converted(write, text, masked | {"s": Range(-3.0, 3.0)}, **weights)
    assert kept(record) == {"where1": "constant_range", "add2": "constant_range", "softmax3": "softmax"}
    record = converted(write, text, masked | {"s": Range(-3.0, 3e4), "a": Range(-1e9, 3e4)}, **weights)
    assert kept(record)["matmul0"] == kept(record)["add2"] == "measured_range"
    assert "s reached 3e+04" in record["kept"][0]["why"]


def test_infinite_masks_do_not_count_and_other_infinities_do(write: Writer) -> None:
    text = """agraph (float[n, 8] x, bool[n, 8] m) => (float[n, 8] y) {
        s = MatMul(x, w)  a = Where(m, s, low)  p = Softmax(a)  y = MatMul(p, w) }"""
    ranges = {"s": Range(-3.0, 3.0), "a": Range(float("-inf"), 3.0)}
    record = converted(write, text, ranges, w=W, low=np.float32(-np.inf))
    assert "measured_range" not in kept(record).values()
    record = converted(write, text, ranges | {"s": Range(float("-inf"), 3.0)}, w=W, low=np.float32(-np.inf))
    assert kept(record)["matmul0"] == "measured_range"
    assert record["kept"][0]["figures"]["largest_abs"] == "inf"


def test_bf16_has_no_range_to_leave(write: Writer) -> None:
    tiny = Range(-1e-6, 1e-6, subnormal=1.0, flushed=0.1, subnormal_weight=1.0)
    for found in (tiny, Range(-1e30, 1e30)):
        assert kept(converted(write, around("b = Relu(a)"), {"a": found}, "bf16", w=W)) == {}
        assert set(kept(converted(write, around("b = Relu(a)"), {"a": found}, "fp16", w=W))) == {"matmul0", "relu1"}


def test_tiny_values_among_large_ones_do_no_harm(write: Writer) -> None:
    found = Range(0.0, 1.0, subnormal=0.9, flushed=0.5, subnormal_weight=0.001)  # the weights of a sharp softmax
    assert kept(converted(write, around("b = Relu(a)"), {"a": found}, w=W)) == {}


def test_values_that_were_not_measured_are_left_to_the_operator(write: Writer) -> None:
    assert kept(converted(write, around("b = Exp(a)"), {"x": QUIET}, w=W)) == {"exp1": "steep_function"}


def test_ranges_survive_json() -> None:
    for found in (Range(-1.5, 2.0, 0.25, 0.125, 0.5, (2, 3)), Range(float("-inf"), float("inf"))):
        assert Range.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found
    assert np.isnan(Range.from_dict(Range(float("nan"), 1.0).to_dict()).largest)
    with pytest.raises(RequestError, match="damaged"):
        Range.from_dict({"low": 0.0})
