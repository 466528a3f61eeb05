from __future__ import annotations

import json

import numpy as np
import pytest

from pipelines.verification.again import judge_agreement_again, judge_quality_again
from pipelines.verification.agreement import agreement
from pipelines.verification.metrics import get_metric
from pipelines.verification.quality import judge_quality, paired_bootstrap

ACCURACY = get_metric("accuracy")


def flipped(rows: int, share: float, seed: int = 0) -> tuple[list[int], list[int], list[int]]:
    """An original that is always right, and a variant that is wrong on `share` of the rows."""
    rng = np.random.default_rng(seed)
    truths = rng.integers(0, 2, rows)
    wrong = rng.random(rows) < share
    return list(truths), list(np.where(wrong, 1 - truths, truths)), list(truths)


def test_samples_of_data_on_which_a_variant_passed_do_not_fail_it() -> None:
    """Half of the samples of a variant that loses just its budget lie outside of it."""
    verdicts = []
    for seed in range(60):
        found = paired_bootstrap(ACCURACY, *flipped(512, 0.005, seed), resamples=300)
        assert judge_quality(found, 0.5)["verdict"] in ("failed", "inconclusive", "passed")
        verdicts.append((judge_quality(found, 0.5)["verdict"], judge_quality_again(found, 0.5, 1.0)["verdict"]))
    assert sum(before == "failed" for before, _ in verdicts) > 10
    assert sum(after == "failed" for _, after in verdicts) <= 4  # 2.5 % of 60, and some luck
    assert {after for _, after in verdicts} >= {"passed", "inconclusive"}


def test_a_worse_variant_fails_on_a_sample_too() -> None:
    found = paired_bootstrap(ACCURACY, *flipped(512, 0.05), resamples=300)
    record = judge_quality_again(found, 0.5, 1.0)
    assert record["verdict"] == "failed"
    json.dumps(record, allow_nan=False)


def test_what_is_undefined_stays_so() -> None:
    found = paired_bootstrap(get_metric("spearman"), [1.0] * 9, [1.0] * 9, list(range(9)), resamples=50)
    assert judge_quality_again(found, 0.5, 1.0)["verdict"] == "inconclusive"


def classes(rows: int, flips: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    one, other = np.array([2.0, 0.0]), np.array([0.0, 2.0])
    return [one] * rows, [other] * flips + [one] * (rows - flips)


@pytest.mark.parametrize(("flips", "verdict"), [(0, "passed"), (10, "passed"), (13, "inconclusive"), (60, "failed")])
def test_agreement_fails_where_the_whole_interval_does(flips: int, verdict: str) -> None:
    original, variant = classes(512, flips)
    record = judge_agreement_again("text-classification", original, variant, 512)
    assert record["verdict"] == verdict
    assert "512 rows of the bundle" in record["reason"]
    json.dumps(record, allow_nan=False)
    assert record == judge_agreement_again("text-classification", original, variant, 512)


def test_embeddings_just_below_the_limit_and_far_below() -> None:
    rng = np.random.default_rng(0)
    original = list(rng.standard_normal((200, 8)))

    def noisy(size: float) -> list[np.ndarray]:
        return [row + size * np.random.default_rng(i).standard_normal(8) for i, row in enumerate(original)]

    near = next(side for size in np.arange(0.05, 0.5, 0.005) if value(original, side := noisy(size)) < 0.99)
    assert value(original, near) > 0.985
    assert judge_agreement_again("feature-extraction", original, near, 200)["verdict"] == "inconclusive"
    assert judge_agreement_again("feature-extraction", original, noisy(0.6), 200)["verdict"] == "failed"
    broken = [row * np.nan for row in original]
    assert judge_agreement_again("feature-extraction", original, broken, 200)["verdict"] == "failed"


def value(original: list[np.ndarray], variant: list[np.ndarray]) -> float:
    found = agreement("feature-extraction", original, variant)[0].value
    assert found is not None
    return found
