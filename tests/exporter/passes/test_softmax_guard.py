from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from exporter.passes.masks import SimplifyMasks
from exporter.passes.softmax_guard import RemoveSoftmaxGuards
from tests.exporter.passes.builders import (
    ATTENTION,
    CAUSAL,
    PADDING,
    attention,
    attention_samples,
    model,
    operators,
    outputs,
    run,
)

CONTRACT = {"attends": True, "mask": "attention_mask"}


@pytest.mark.parametrize("minus", [float("-inf"), -3.4028234663852886e38, -1e9])
def test_both_guards_go_under_the_contract(minus: float) -> None:
    graph = attention(PADDING, minus=minus)
    record = run(RemoveSoftmaxGuards(), graph, attention_samples(), **CONTRACT)
    assert record.changed == 2
    assert operators(graph).count("Where") == 1  # the mask itself
    assert "IsNaN" not in operators(graph)
    assert "ReduceSum" not in operators(graph)
    assert record.rms_relative == 0
    assert all("attention_mask" in change.why for change in record.changes)


def test_without_the_contract_the_guards_stay_and_a_row_of_nothing_is_as_before(tmp_path: Path) -> None:
    graph, samples = attention(PADDING), attention_samples(nothing=True)
    before = outputs(graph, samples, tmp_path)
    record = run(RemoveSoftmaxGuards(), graph, samples, attends=False, mask="attention_mask")
    assert record.changed == 0
    assert "do" in record.why
    assert "not promise" in record.why
    after = outputs(graph, samples, tmp_path)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a["y"], b["y"])
        assert np.isfinite(b["y"]).all()
        assert (b["y"][-1] == 0).all()


def test_the_guards_are_what_keeps_a_row_of_nothing_finite(tmp_path: Path) -> None:
    graph = attention(PADDING)
    run(RemoveSoftmaxGuards(), graph, attention_samples(), **CONTRACT)
    (_, result, _) = outputs(graph, attention_samples(nothing=True), tmp_path)
    assert np.isnan(result["y"][-1]).all()


def test_a_causal_mask_keeps_its_guards_whatever_the_contract_says(tmp_path: Path) -> None:
    # With padding in front, the first queries see nothing although their row attends.
    graph, samples = attention(CAUSAL), attention_samples(left=True)
    before = outputs(graph, samples, tmp_path)
    record = run(RemoveSoftmaxGuards(), graph, samples, **CONTRACT)
    assert record.changed == 0
    assert operators(graph).count("IsNaN") == 1
    assert (before[1]["y"][2, :, 0] == 0).all()


def test_a_causal_mask_keeps_its_guards_after_the_masks_are_simplified(tmp_path: Path) -> None:
    graph, samples = attention(CAUSAL), attention_samples(left=True)
    run(SimplifyMasks(), graph, samples)
    assert run(RemoveSoftmaxGuards(), graph, samples, **CONTRACT).changed == 0


def test_a_mask_from_another_input_keeps_its_guards() -> None:
    graph = attention(PADDING)
    assert run(RemoveSoftmaxGuards(), graph, attention_samples(), attends=True, mask="other").changed == 0


def test_keys_on_another_axis_keep_their_guards() -> None:
    graph = attention(PADDING)
    axes = graph.graph.initializers["axes"]
    # [batch, 1, sequence, 1]: the mask now forbids queries, not keys.
    axes.const_value = ir.tensor(np.array([1, 3], np.int64), name="axes")
    assert run(RemoveSoftmaxGuards(), graph, [], **CONTRACT).changed == 0


BIAS = "masked = Add (scores, bias)"
# fmt: off
OTHER_MASKS = {
    "added before": "causal = Add (scores, beyond)\n    masked = Add (causal, bias)",
    "added to the bias": "causal = Add (bias, beyond)\n    masked = Add (scores, causal)",
    "chosen before": "causal = Where (triangle, scores, minus)\n    masked = Add (causal, bias)",
    "chosen around": "causal = Where (triangle, scores, minus)\n    masked = Where (keys, causal, minus)",
    "scaled after": "causal = Add (scores, beyond)\n    half = Mul (causal, one)\n    masked = Add (half, bias)",
    "from an input": "causal = Add (scores, given)\n    masked = Add (causal, bias)",
}
# fmt: on


@pytest.mark.parametrize("other", OTHER_MASKS)
def test_another_mask_beside_the_padding_keeps_the_guard(other: str, tmp_path: Path) -> None:
    # Left padding, which no sample here has, would leave the first queries without a key that both masks allow.
    text = (ATTENTION % {"mask": PADDING, "minus": "0.0"}).replace(BIAS, OTHER_MASKS[other])
    text = text.replace("int64[batch, sequence] attention_mask", "int64[batch, 4] attention_mask, float[4, 4] given")
    text = (
        text.replace("sequence, 4] q", "4, 4] q")
        .replace("sequence, 4] k", "4, 4] k")
        .replace("sequence, 4] y", "4, 4] y")
    )
    graph = model(text, beyond=np.triu(np.full((4, 4), -np.inf, np.float32), 1), triangle=np.tri(4, dtype=bool))
    graph.graph.initializers["minus"].const_value = ir.tensor(np.array(-np.inf, np.float32), name="minus")
    random = np.random.default_rng(3)
    q, k = (random.standard_normal((2, 2, 4, 4)).astype(np.float32) for _ in range(2))
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    sample = {"q": q, "k": k, "attention_mask": mask, "given": np.zeros((4, 4), np.float32)}
    record = run(RemoveSoftmaxGuards(), graph, [sample], **CONTRACT)
    assert "IsNaN" in operators(graph)
    assert [change.op for change in record.changes] == ["Where"]  # only the count over the padding itself
    sample |= {"attention_mask": mask[:, ::-1].copy(), "given": np.triu(np.full((4, 4), -np.inf, np.float32), 1)}
    (result,) = outputs(graph, [sample], tmp_path)
    assert np.isfinite(result["y"]).all()


def test_scale_and_a_learned_bias_beside_the_padding_are_no_mask() -> None:
    text = (ATTENTION % {"mask": PADDING, "minus": "-1e9"}).replace(
        BIAS,
        "half = Mul (scores, one)\n    rows = Gather (table, start)\n    near = Add (half, rows)\n"
        "    masked = Add (near, bias)",
    )
    graph = model(text, table=np.ones((5, 1), np.float32))
    assert run(RemoveSoftmaxGuards(), graph, attention_samples(), **CONTRACT).changed == 2


def test_a_guard_that_gives_the_result_its_shape_stays() -> None:
    graph = model(
        """g (int64[batch, 4] attention_mask) => (float[batch, 3] y)
            <int64[1] last = {-1}, int64 one = {1}, float zero = {0.0}, float[1, 3] row = {1.0, 2.0, 3.0}> {
            allowed = Cast <to = 9> (attention_mask)
            counted = Cast <to = 7> (allowed)
            count = ReduceSum <keepdims = 1> (counted, last)
            nothing = Less (count, one)
            y0 = Where (nothing, zero, row)
            y = Neg (y0)
        }"""
    )
    samples = [{"attention_mask": np.ones((1, 4), np.int64)}]
    assert run(RemoveSoftmaxGuards(), graph, samples, **CONTRACT).changed == 0
