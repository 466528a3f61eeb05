from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from exporter.errors import RequestError
from pipelines.verification.envelope import Case
from pipelines.verification.judgement import FIXED_FLOOR, Floor, compare_alone, fixed_floor, judge
from pipelines.verification.parity import Magnitudes, compare, relative_rms


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def brute_force(b: np.ndarray, a: np.ndarray, valid: np.ndarray) -> tuple[float, float, float]:
    """Largest difference, relative RMS and smallest cosine, one vector at a time."""
    largest, above, below, cosine = 0.0, 0.0, 0.0, 1.0
    for i in range(b.shape[0]):
        for j in range(b.shape[1]):
            if not valid[i, j]:
                continue
            x, y = (side[i, j].astype(np.float64) for side in (b, a))
            largest = max(largest, abs(x - y).max())
            above += float(((x - y) ** 2).sum())
            below += float((x**2).sum())
            cosine = min(cosine, float(x @ y / np.sqrt((x @ x) * (y @ y))))
    return largest, float(np.sqrt(above / below)), cosine


def test_it_equals_a_brute_force_computation(rng: np.random.Generator) -> None:
    b = rng.standard_normal((4, 9, 16)).astype(np.float32)
    a = b + 1e-3 * rng.standard_normal(b.shape).astype(np.float32)
    valid = rng.random((4, 9)) < 0.6
    for mask in (valid, np.ones_like(valid)):
        found = compare({"y": b}, {"y": a}, valid=mask.astype(np.int64))["y"]
        largest, rms, cosine = brute_force(b, a, mask)
        assert found.max_abs == pytest.approx(largest, rel=1e-12)
        assert found.rms_relative == pytest.approx(rms, rel=1e-9)
        assert found.cosine_min == pytest.approx(cosine, rel=1e-12)
        everywhere = brute_force(b, a, np.ones_like(valid))
        assert found.rms_relative_all == pytest.approx(everywhere[1], rel=1e-9)


def test_chunks_do_not_change_the_result(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    b = rng.standard_normal((5, 7, 6)).astype(np.float32)
    a = b + np.float32(1e-4) * rng.standard_normal(b.shape).astype(np.float32)
    valid = rng.random((5, 7)) < 0.7
    whole = compare({"y": b}, {"y": a}, logits={"y"}, valid=valid)["y"]
    monkeypatch.setattr("pipelines.verification.parity._CHUNK_ELEMENTS", 20)
    parts = compare({"y": b}, {"y": a}, logits={"y"}, valid=valid)["y"]
    assert parts.rms_relative == pytest.approx(whole.rms_relative, rel=1e-12)
    assert (parts.max_abs, parts.top1_agreement, parts.cosine_min) == (
        whole.max_abs,
        whole.top1_agreement,
        pytest.approx(whole.cosine_min),
    )


def test_sums_do_not_overflow_or_drown() -> None:
    b = np.full((2, 1000), 1e30, np.float32)
    assert compare({"y": b}, {"y": b * np.float32(1.5)})["y"].rms_relative == pytest.approx(0.5, rel=1e-6)
    half = np.full((1, 4096), 60000, np.float16)
    assert compare({"y": half}, {"y": half})["y"].rms_relative == 0.0


def test_one_planted_nan_is_found_even_in_padding(rng: np.random.Generator) -> None:
    b = rng.standard_normal((2, 3, 4)).astype(np.float32)
    a = b.copy()
    a[1, 2, 3] = np.nan
    valid = np.array([[1, 1, 1], [1, 1, 0]])
    found = compare({"y": b}, {"y": a}, valid=valid)["y"]
    assert (found.nan, found.inf, found.nonfinite_mismatch) == (1, 0, 1)
    assert found.rms_relative == 0.0
    record = judge("int8", {"case": {"y": found}}, None)
    assert record["verdict"] == "failed"
    assert "1 values are NaN or Inf" in record["reason"]


def test_nan_and_inf_of_the_original_are_expected(rng: np.random.Generator) -> None:
    b = rng.standard_normal((2, 5)).astype(np.float32)
    b[0, 1], b[1, 2], b[1, 3] = np.nan, np.inf, -np.inf
    found = compare({"y": b}, {"y": b.copy()}, logits={"y"})["y"]
    assert (found.nan, found.inf, found.nonfinite_mismatch, found.rms_relative) == (1, 2, 0, 0.0)
    other = b.copy()
    other[1, 2] = -np.inf
    assert compare({"y": b}, {"y": other})["y"].nonfinite_mismatch == 1


def test_top1_agreement_leaves_padding_out() -> None:
    logits = np.zeros((2, 3, 4))
    logits[..., 1] = 1
    changed = logits.copy()
    changed[0, 0, 2] = 5
    changed[1, 2, 3] = 5  # padding
    valid = np.array([[1, 1, 1], [1, 1, 0]])
    assert compare({"y": logits}, {"y": changed}, logits={"y"}, valid=valid)["y"].top1_agreement == pytest.approx(4 / 5)
    assert compare({"y": logits}, {"y": changed}, logits={"y"})["y"].top1_agreement == pytest.approx(4 / 6)
    assert compare({"y": logits}, {"y": changed})["y"].top1_agreement is None


def test_span_logits_are_compared_over_the_positions_that_count() -> None:
    start = np.array([[1.0, 2.0, 9.0], [3.0, 1.0, 0.0]])
    other = np.array([[1.0, 2.0, -50.0], [3.0, 1.0, 0.0]])
    valid = np.array([[1, 1, 0], [1, 1, 1]])
    found = compare({"start": start}, {"start": other}, logits={"start"}, valid=valid)["start"]
    assert (found.rms_relative, found.top1_agreement, found.cosine_min) == (0.0, 1.0, pytest.approx(1.0))
    assert found.rms_relative_all > 1


def test_a_mask_does_not_apply_to_pooled_outputs(rng: np.random.Generator) -> None:
    b = rng.standard_normal((2, 8))
    found = compare({"y": b}, {"y": b + 1}, valid=np.array([[1, 0], [0, 0]]))["y"]
    assert found.max_abs == pytest.approx(1.0)


def test_swapped_rows_fail(rng: np.random.Generator) -> None:
    b = rng.standard_normal((4, 8)).astype(np.float32)
    found = compare({"y": b}, {"y": b[[1, 0, 2, 3]]})
    assert found["y"].cosine_min < 0.9
    assert judge("fp32", {"case": found}, fixed_floor("a test"))["verdict"] == "failed"


def test_other_shapes_and_missing_outputs_fail_in_every_precision(rng: np.random.Generator) -> None:
    b = rng.standard_normal((2, 3))
    for actual in ({}, {"y": b[:1]}, {"y": b.T}):
        for precision in ("fp32", "int8"):
            record = judge(precision, {"case": compare({"y": b}, actual)}, fixed_floor("a test"))
            assert record["verdict"] == "failed"
            assert record["outputs"]["y"]["rms_relative"] is None
            json.dumps(record, allow_nan=False)


def test_zero_vectors() -> None:
    zero, one = np.zeros((1, 3)), np.ones((1, 3))
    same = compare({"y": zero}, {"y": zero})["y"]
    assert (same.rms_relative, same.cosine_min) == (0.0, 1.0)
    differ = compare({"y": zero}, {"y": one})["y"]
    assert (differ.rms_relative, differ.cosine_min) == (np.inf, 0.0)


def test_empty_and_scalar_outputs() -> None:
    assert compare({"y": np.zeros((0, 3))}, {"y": np.zeros((0, 3))})["y"].rms_relative == 0.0
    assert relative_rms(np.array(2.0), np.array(3.0)) == pytest.approx(0.5)


# The judgement --------------------------------------------------------------------------------------------------------


def errors_of(rms: float) -> dict:
    b = np.ones((1, 4))
    return compare({"y": b}, {"y": b * (1 + rms)})


@pytest.mark.parametrize(
    ("precision", "rms", "floor", "verdict"),
    [
        ("fp32", 9e-6, 1e-6, "passed"),
        ("fp32", 1.1e-5, 1e-6, "failed"),
        ("fp32", 9e-7, 1e-12, "passed"),  # the floor is at least 1e-7
        ("fp32", 1.1e-6, 1e-12, "failed"),
        ("fp16", 1.9e-3, 1e-3, "passed"),
        ("fp16", 2.1e-3, 1e-3, "failed"),
        ("bf16", 1.9e-2, 1e-2, "passed"),
        ("bf16", 2.1e-2, 1e-2, "failed"),
        ("int8", 0.5, 1e-9, "passed"),
    ],
)
def test_limits_are_multiples_of_the_floor(precision: str, rms: float, floor: float, verdict: str) -> None:
    record = judge(precision, {"case": errors_of(rms)}, Floor("measured", {"case": {"y": floor}}))
    assert record["verdict"] == verdict
    assert record["outputs"]["y"]["rms_relative"] == pytest.approx(rms, rel=1e-6)
    if verdict == "failed":
        assert record["ratio"] > 1
        assert "limit" in record["reason"]
    if precision == "int8":
        assert record["ratio"] is record["limit"] is None


def test_without_an_fp64_run_the_floor_is_fixed() -> None:
    floor = fixed_floor("the model pins FP32")
    assert judge("fp32", {"case": errors_of(9 * FIXED_FLOOR)}, floor)["verdict"] == "passed"
    record = judge("fp32", {"case": errors_of(11 * FIXED_FLOOR)}, floor)
    assert record["verdict"] == "failed"
    assert "the model pins FP32" in record["floor_note"]


def test_without_a_half_run_half_is_inconclusive() -> None:
    record = judge("fp16", {"case": errors_of(1e-9)}, Floor("no half run of this model"))
    assert record["verdict"] == "inconclusive"
    assert "no half run of this model" in record["reason"]
    assert judge("fp16", {}, Floor("none"))["verdict"] == "inconclusive"


def test_a_case_is_judged_by_its_own_floor_or_the_pooled_one() -> None:
    floor = Floor("measured", {"short": {"y": 1e-9}, "long": {"y": 4e-6}})
    pooled = np.sqrt(((1e-9) ** 2 + (4e-6) ** 2) / 2)
    assert floor.of("short", "y") == pytest.approx(pooled)
    assert floor.of("long", "y") == 4e-6
    assert floor.of("not measured", "y") == pytest.approx(pooled)
    record = judge("fp32", {"short": errors_of(2e-5), "long": errors_of(5e-5)}, floor, shapes={"long": "1x512"})
    assert [case["verdict"] for case in record["cases"]] == ["passed", "failed"]
    assert record["cases"][1]["shape"] == "1x512"
    assert record["ratio"] == pytest.approx(5e-5 / 4e-5, rel=1e-6)
    assert (record["floor"], record["limit"]) == (4e-6, pytest.approx(4e-5))


def test_unknown_precisions_are_refused() -> None:
    with pytest.raises(RequestError, match="no parity rule"):
        judge("fp12", {}, None)


# A sample alone against the same in a batch ---------------------------------------------------------------------------


def pair(rng: np.random.Generator, noise: float) -> dict[str, dict[str, np.ndarray]]:
    alone = rng.standard_normal((1, 5, 8))
    batch = rng.standard_normal((4, 9, 8))
    batch[1, :5] = alone[0] * (1 + noise * rng.standard_normal((5, 8)))
    vector = rng.standard_normal((1, 8))
    vectors = np.concatenate([vector + 1, vector * (1 + noise), vector + 2])
    return {
        "alone": {"hidden": alone, "vector": vector, "scalar": np.array(1.0)},
        "batch": {"hidden": batch, "vector": vectors, "scalar": np.array(2.0)},
    }


def test_inconsistency_is_judged_by_the_originals_own(rng: np.random.Generator) -> None:
    case = Case("alone", {}, "alone", partner="batch", row=1)
    floor = Floor("measured", {"alone": {"hidden": 1e-7, "vector": 1e-7, "y": 1e-7}})
    good = {"alone": errors_of(1e-7)}
    original = pair(rng, 1e-6)
    for noise, verdict in ((1e-6, "passed"), (1e-4, "failed")):
        records = compare_alone(case, original, pair(rng, noise))
        assert [record["output"] for record in records] == ["hidden", "vector"]
        assert records[1]["variant"] == pytest.approx(noise, rel=1e-6)
        assert judge("fp32", good, floor, consistency=records)["verdict"] == verdict
        assert judge("int8", good, None, consistency=records)["verdict"] == "passed"


def test_a_sample_that_sees_its_neighbours_is_found(rng: np.random.Generator) -> None:
    case = Case("alone", {}, "alone", partner="batch", row=1)
    original = variant = pair(rng, 0.0)
    variant = {**variant, "batch": {**variant["batch"], "vector": variant["batch"]["vector"][[1, 0, 2]]}}
    records = compare_alone(case, original, variant)
    record = judge("fp32", {"alone": errors_of(0)}, fixed_floor("a test"), consistency=records)
    assert record["verdict"] == "failed"
    assert "alone and in a padded batch" in record["reason"]
    with pytest.raises(RequestError, match="partner"):
        compare_alone(Case("x", {}, "shape"), original, variant)


def test_a_number_that_is_near_zero_by_chance_is_held_against_the_outputs_usual_size() -> None:
    """One score of 1e-4 where scores are about 1: an error of 4e-7 is rounding, one of 4e-5 is not."""
    rng = np.random.default_rng(0)
    scores = {f"case-{i}": {"y": rng.standard_normal((8, 1))} for i in range(5)} | {"one": {"y": np.array([[1e-4]])}}
    magnitudes = Magnitudes()
    for outputs in scores.values():
        magnitudes.add(outputs)
    usual = magnitudes.usual()
    assert 0.5 < usual["y"] < 1.5

    def verdict(error: float, floor: Floor) -> dict[str, Any]:
        errors = {name: compare(outputs, {"y": outputs["y"] + error}) for name, outputs in scores.items()}
        return judge("fp32", errors, floor)

    measured = {name: {"y": 1e-7} for name in scores}
    fixed = verdict(4e-7, Floor("measured", measured, magnitudes=usual))
    assert fixed["verdict"] == "passed"
    one = next(case for case in fixed["cases"] if case["name"] == "one")
    assert one["rms_relative"]["y"] == pytest.approx(4e-3, rel=1e-3)
    assert one["rms_judged"]["y"] == pytest.approx(4e-7 / usual["y"], rel=1e-3)
    assert verdict(4e-7, Floor("measured", measured))["verdict"] == "failed"
    assert verdict(4e-5, Floor("measured", measured, magnitudes=usual))["verdict"] == "failed"


def test_magnitudes_count_what_counts() -> None:
    magnitudes = Magnitudes()
    hidden = np.array([[[3.0], [100.0]], [[4.0], [np.nan]]])
    magnitudes.add({"hidden": hidden}, np.array([[1, 0], [1, 0]]))
    assert magnitudes.usual()["hidden"] == pytest.approx(np.sqrt(12.5))
    zero = compare({"y": np.zeros(3)}, {"y": np.full(3, 1e-3)})["y"]
    assert (zero.relative_to(0.0), zero.relative_to(2.0)) == (np.inf, pytest.approx(5e-4))
