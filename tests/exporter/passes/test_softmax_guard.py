from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from exporter.passes.masks import SimplifyMasks
from exporter.passes.softmax_guard import RemoveSoftmaxGuards
from tests.exporter.passes.builders import CAUSAL, PADDING, attention, attention_samples, operators, outputs, run

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
    import onnx_ir as ir

    # [batch, 1, sequence, 1]: the mask now forbids queries, not keys.
    axes.const_value = ir.tensor(np.array([1, 3], np.int64), name="axes")
    assert run(RemoveSoftmaxGuards(), graph, [], **CONTRACT).changed == 0
