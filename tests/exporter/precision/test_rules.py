from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from exporter.artifact import InputContract
from exporter.precision.facts import Facts
from exporter.precision.half import convert
from exporter.precision.ranges import Range
from exporter.precision.rules import apply_rules, rules

from .conftest import Writer, kept, rms, run

RNG = np.random.default_rng(3)
NONE = InputContract()
W = RNG.standard_normal((8, 8)).astype(np.float32)
LOWEST = float(np.finfo(np.float32).min)


def weights(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def fp16(path: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    out = path.with_name(f"half-{path.name}")
    return out, convert(path, out, **({"precision": "fp16", "contract": NONE} | options))


def all_but(*left_out: str) -> list[str]:
    return [name for name in rules() if name not in left_out]


MASKED = """agraph (float[n, 8] x, bool[n, 8] mask) => (float[n, 8] y) {
    s = MatMul(x, w)
    b = Where(mask, zero, low)
    m = Add(s, b)
    p = Softmax(m)
    y = MatMul(p, w)
}"""


@pytest.mark.parametrize("low", [-np.inf, -1e9, LOWEST, -1e4])
@pytest.mark.parametrize("left_out", [(), ("softmax", "softmax_input")])
def test_masks_stay_masks(write: Writer, promise: InputContract, low: float, left_out: tuple[str, ...]) -> None:
    path = write(MASKED, w=W, zero=np.float32(0), low=np.float32(low))
    out, record = fp16(path, contract=promise, rules=all_but(*left_out))
    x = RNG.standard_normal((4, 8)).astype(np.float32)
    mask = np.array([[1] * 8, [1] * 3 + [0] * 5, [0] * 7 + [1], [0, 1] * 4], dtype=bool)
    (y,) = run(out, x=x, mask=mask)
    assert np.isfinite(y).all()
    assert rms(y, run(path, x=x, mask=mask)[0]) < 2e-3
    clamped = [c["constant"] for c in record["constants"]["changed"]]
    beyond = np.isfinite(low) and low < -65504
    assert clamped == (["low"] if beyond and left_out else [])
    if not left_out:
        assert weights(out)["low"].dtype == np.float32
        assert weights(out)["low"] == np.float32(low)
    elif beyond:
        assert weights(out)["low"] == np.float16(-65504)


def test_a_mask_is_not_clamped_without_the_promise(write: Writer) -> None:
    path = write(MASKED, w=W, zero=np.float32(0), low=np.float32(-1e9))
    out, record = fp16(path, rules=all_but("softmax", "softmax_input"))
    assert record["constants"]["changed"] == []
    assert {name for name, rule in kept(record).items() if rule == "constant_range"} == {"where1", "add2", "softmax3"}
    # A row that attends to nothing is uniform in FP32, and remains so.
    x, mask = RNG.standard_normal((1, 8)).astype(np.float32), np.zeros((1, 8), bool)
    assert rms(run(out, x=x, mask=mask)[0], run(path, x=x, mask=mask)[0]) < 2e-3


def test_bf16_cannot_hold_the_lowest_float_either(write: Writer, promise: InputContract, tmp_path: Path) -> None:
    path = write(MASKED, w=W, zero=np.float32(0), low=np.float32(LOWEST))
    record = convert(path, tmp_path / "b.onnx", precision="bf16", contract=promise)
    assert kept(record)["where1"] == "constant_range"
    path = write(MASKED, w=W, zero=np.float32(0), low=np.float32(-1e9))
    record = convert(path, tmp_path / "b.onnx", precision="bf16", contract=promise)
    assert "constant_range" not in kept(record).values()


def test_a_mask_made_by_arithmetic(write: Writer, promise: InputContract) -> None:
    text = """agraph (float[n, 8] x, int64[n, 8] mask) => (float[n, 8] y) {
        f = Cast<to = 1>(mask)
        i = Sub(one, f)
        b = Mul(i, low)
        s = MatMul(x, w)
        m = Add(s, b)
        p = Softmax(m)
        y = MatMul(p, w)
    }"""
    path = write(text, w=W, one=np.float32(1), low=np.float32(LOWEST))
    out, record = fp16(path, contract=promise)
    assert kept(record)["mul2"] == kept(record)["add4"] == "constant_range"
    x = RNG.standard_normal((3, 8)).astype(np.float32)
    mask = np.array([[1] * 8, [1] * 3 + [0] * 5, [0] * 7 + [1]])
    assert rms(run(out, x=x, mask=mask)[0], run(path, x=x, mask=mask)[0]) < 2e-3


def test_a_planted_weight_beyond_fp16_is_found_and_named(write: Writer) -> None:
    large = W.copy()
    large[3, 5] = 1e5
    path = write(
        "agraph (float[n, 8] x) => (float[n, 8] y) { h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, big) }",
        w=W,
        big=large,
    )
    out, record = fp16(path)
    assert kept(record) == {"matmul2": "constant_range"}
    (decision,) = record["kept"]
    assert decision["figures"]["constant"] == "big"
    assert decision["figures"]["largest_abs"] == 100000.0
    assert decision["figures"]["limit"] == 65504.0
    assert weights(out)["big"].dtype == np.float32
    record = convert(path, out, precision="bf16", contract=NONE)
    assert record["kept"] == []


def test_measured_ranges_keep_producer_and_readers(write: Writer) -> None:
    text = """agraph (float[n, 8] x) => (float[n, 8] y) {
        a = MatMul(x, w)
        b = MatMul(a, w)
        c = Relu(b)
        d = MatMul(c, w)
        y = MatMul(d, w)
    }"""
    path = write(text, w=W)
    quiet = dict.fromkeys("xabcdy", Range(-10.0, 10.0))
    _, record = fp16(path, ranges=quiet)
    assert record["kept"] == []
    loud = quiet | {"c": Range(0.0, 20000.0)}
    _, record = fp16(path, ranges=loud)
    assert kept(record) == {"relu2": "measured_range", "matmul3": "measured_range"}
    figures = record["kept"][0]["figures"]
    assert figures == {"value": "c", "largest_abs": 20000.0, "limit": 16376.0, "margin": 4.0}
    assert record["kept"][0]["why"] == "c reached 2e+04, beyond fp16 with margin 4"
    _, record = fp16(path, ranges=loud, margin=1.0)
    assert record["kept"] == []
    _, record = fp16(path, ranges=quiet | {"c": Range(float("nan"), float("nan"))})
    assert set(kept(record)) == {"relu2", "matmul3"}
    _, record = fp16(path, ranges=loud, precision="bf16")
    assert record["kept"] == []


def test_an_epsilon_that_would_vanish_keeps_its_node(write: Writer) -> None:
    text = "agraph (float[n, 8] x) => (float[n, 8] y) { h = MatMul(x, w)  c = Add(h, eps)  y = MatMul(c, w) }"
    path = write(text, w=W, eps=np.float32(1e-12))
    _, record = fp16(path)
    assert kept(record) == {"add1": "constant_precision"}
    assert record["kept"][0]["figures"]["rms_relative"] == 1.0
    record = convert(path, path.with_name("b.onnx"), precision="bf16", contract=NONE)
    assert record["kept"] == []


def test_an_embedding_ends_normalized(write: Writer, promise: InputContract) -> None:
    text = """agraph (float[batch, sequence, 8] x, int64[batch, sequence, 1] mask) => (float[batch, 8] y) {
        h = MatMul(x, w)
        f = Cast<to = 1>(mask)
        m = Mul(h, f)
        s = ReduceSum<keepdims = 0>(m, one)
        c = ReduceSum<keepdims = 0>(f, one)
        d = Clip(c, tiny)
        e = Div(s, d)
        l = ReduceL2(e, one)
        g = Clip(l, tiny)
        y = Div(e, g)
    }"""
    path = write(text, w=W, one=np.array([1]), tiny=np.float32(1e-12))
    out, record = fp16(path, contract=promise)
    assert kept(record) == {
        "reducesum3": "reduction",
        "reducesum4": "reduction",
        "clip5": "constant_precision",
        "div6": "division",
        "reducel27": "reduction",
        "clip8": "constant_precision",
        "div9": "division",
    }
    x = RNG.standard_normal((2, 600, 8)).astype(np.float32) * 200
    mask = np.ones((2, 600, 1), np.int64)
    mask[1, 3:] = 0
    assert rms(run(out, x=x, mask=mask)[0], run(path, x=x, mask=mask)[0]) < 1e-3


def test_reductions_by_depth(write: Writer) -> None:
    text = """agraph (float[n, 8, 100] x) => (float[n, 8] y, float[n, 100] z, float[8, 100] t) {
        h = Mul(x, half)
        y = ReduceMean<keepdims = 0>(h, two)
        z = ReduceMean<keepdims = 0>(h, one)
        t = ReduceMean<keepdims = 0>(h, zero)
    }"""
    path = write(text, half=np.float32(0.5), zero=np.array([0]), one=np.array([1]), two=np.array([2]))
    _, record = fp16(path, rules=all_but("between"))
    depth = {d["node"]: d["figures"].get("depth") for d in record["kept"]}
    assert depth == {"reducemean1": 100, "reducemean3": None}


def test_decomposed_layer_norm_stays_whole(write: Writer) -> None:
    text = """agraph (float[n, 8] x) => (float[n, 8] y) {
        h = MatMul(x, w)
        mean = ReduceMean(h, last)
        c = Sub(h, mean)
        q = Mul(c, c)
        v = ReduceMean(q, last)
        e = Add(v, eps)
        r = Sqrt(e)
        o = Div(c, r)
        g = Mul(o, gain)
        y = MatMul(g, w)
    }"""
    spread = {"mul3": "square", "reducemean4": "statistics", "add5": "statistics", "sqrt6": "statistics"}
    for width, first in ((8, {}), (64, {"reducemean1": "reduction", "sub2": "statistics"})):
        w = RNG.standard_normal((width, width)).astype(np.float32)
        path = write(text.replace("8", str(width)), w=w, last=np.array([-1]), eps=np.float32(1e-5), gain=w[0])
        out, record = fp16(path, rules=all_but("between"))
        expected = spread | first | {"div7": "division"}
        if first:
            expected |= {"reducemean4": "reduction"}
        assert kept(record) == expected
        x = RNG.standard_normal((4, width)).astype(np.float32) * 300  # a variance that FP16 can't hold
        assert rms(run(out, x=x)[0], run(path, x=x)[0]) < 3e-3


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [({}, {"mul1": "positions", "cos2": "steep_function"}), ({"ids": (0, 100)}, {"cos2": "steep_function"})],
)
def test_positions_are_exact(write: Writer, bounds: dict[str, tuple[int, int]], expected: dict[str, str]) -> None:
    text = """agraph (int64[n, 1] ids) => (float[n, 8] y) {
        p = Cast<to = 1>(ids)
        a = Mul(p, freq)
        c = Cos(a)
        y = MatMul(c, w)
    }"""
    path = write(text, w=W, freq=np.linspace(0.5, 1, 8, dtype=np.float32))
    out, record = fp16(path, contract=InputContract(id_ranges=bounds), rules=all_but("between"))
    assert kept(record) == expected
    if not bounds:
        ids = np.array([[1], [2049], [4001]])
        assert rms(run(out, ids=ids)[0], run(path, ids=ids)[0]) < 2e-3


def test_every_decision_says_why(write: Writer, promise: InputContract) -> None:
    path = write(MASKED, w=W, zero=np.float32(0), low=np.float32(-1e9))
    _, record = fp16(path, contract=promise)
    assert record["kept"]
    for decision in record["kept"]:
        assert decision["keep"] == "fp32"
        assert decision["rule"] in rules()
        assert len(decision["why"]) > 10


def test_rules_left_out_do_not_run(write: Writer) -> None:
    from exporter.onnx_files import load_model
    from exporter.precision.half import prepare
    from exporter.precision.schemas import half_type

    path = write(
        "agraph (float[n, 8] x) => (float[n, 8] y) { h = MatMul(x, w)  s = Softmax(h)  y = MatMul(s, w) }", w=W
    )
    for names, expected in ((None, {"softmax1"}), (["softmax"], {"softmax1"}), ([], set())):
        model = load_model(path)
        prepare(model)
        facts = Facts(model, half_type("fp16"), NONE)
        apply_rules(facts, names)
        assert set(facts.kept) == expected
