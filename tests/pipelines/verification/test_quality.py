from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from exporter.errors import RequestError
from pipelines.verification.metrics import get_metric
from pipelines.verification.quality import Difference, judge_quality, more_samples, paired_bootstrap

ACCURACY, SPEARMAN = get_metric("accuracy"), get_metric("spearman")


def brute_force(metric: str, original: list, variant: list, truths: list, resamples: int) -> tuple[float, float]:
    """The interval of the difference, one resample at a time with SciPy's correlation."""
    rng = np.random.default_rng(99)
    x, y, t = (np.asarray(side) for side in (original, variant, truths))
    values = []
    for _ in range(resamples):
        drawn = rng.integers(0, len(t), len(t))
        if metric == "accuracy":
            values.append((y[drawn] == t[drawn]).mean() - (x[drawn] == t[drawn]).mean())
        else:
            values.append(stats.spearmanr(y[drawn], t[drawn])[0] - stats.spearmanr(x[drawn], t[drawn])[0])
    low, high = np.quantile(values, [0.025, 0.975])
    return 100 * low, 100 * high


def rated(seed: int, rows: int, noise: float = 0.1) -> tuple[list, list, list]:
    rng = np.random.default_rng(seed)
    truths = np.round(rng.uniform(0, 5, rows), 1)
    original = truths + rng.normal(0, 1, rows)
    return list(original), list(original + rng.normal(0, noise, rows)), list(truths)


def classified(seed: int, rows: int, flips: float = 0.05) -> tuple[list, list, list]:
    rng = np.random.default_rng(seed)
    truths = rng.integers(0, 2, rows)
    original = np.where(rng.random(rows) < 0.85, truths, 1 - truths)
    variant = np.where(rng.random(rows) < flips, 1 - original, original)
    return list(original), list(variant), list(truths)


@pytest.mark.parametrize(("metric", "make"), [("accuracy", classified), ("spearman", rated)])
def test_the_interval_equals_a_brute_force_one(metric: str, make) -> None:
    original, variant, truths = make(1, 300)
    found = paired_bootstrap(get_metric(metric), original, variant, truths, resamples=4000)
    low, high = brute_force(metric, original, variant, truths, 1500)
    width = high - low
    assert found.low == pytest.approx(low, abs=0.12 * width)
    assert found.high == pytest.approx(high, abs=0.12 * width)
    assert found.low <= found.difference <= found.high
    assert found.difference == pytest.approx(100 * (found.variant - found.original))
    assert found.original_low < found.original < found.original_high


def test_it_depends_on_its_arguments_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rated(2, 100)
    one = paired_bootstrap(SPEARMAN, *rows, resamples=300, seed=4)
    np.random.seed(0)
    assert one == paired_bootstrap(SPEARMAN, *rows, resamples=300, seed=4)
    assert one != paired_bootstrap(SPEARMAN, *rows, resamples=300, seed=5)


def test_both_models_see_the_same_resamples() -> None:
    """Unpaired, the interval of two equal models would be as wide as that of the metric itself."""
    original, _, truths = rated(3, 200)
    found = paired_bootstrap(SPEARMAN, original, original, truths)
    assert (found.difference, found.low, found.high) == (0.0, 0.0, 0.0)
    assert found.original_high - found.original_low > 0.05


@pytest.mark.parametrize("make", [classified, rated])
def test_the_interval_covers_the_true_difference_about_as_often_as_it_says(make) -> None:
    metric = ACCURACY if make is classified else SPEARMAN
    big = make(1000, 200_000)
    truth = 100 * (metric.value(big[1], big[2]) - metric.value(big[0], big[2]))
    found = [paired_bootstrap(metric, *make(seed, 150), resamples=400) for seed in range(200)]
    covered = np.mean([one.low <= truth <= one.high for one in found])
    # 95 % of 200 within three standard errors of 1.5 %, and some room for the percentile interval's own bias.
    assert 0.88 <= covered <= 0.995


def test_a_planted_loss_is_found() -> None:
    original, _, truths = classified(6, 1000)
    variant = [1 - p if i % 10 == 0 else p for i, p in enumerate(original)]
    record = judge_quality(paired_bootstrap(ACCURACY, original, variant, truths), max_drop=0.5)
    assert record["verdict"] == "failed"
    assert record["difference"] < -3
    assert record["high"] < 0


def test_rows_are_paired_by_position() -> None:
    original, _, truths = rated(7, 300)
    swapped = original[1:] + original[:1]
    assert judge_quality(paired_bootstrap(SPEARMAN, original, swapped, truths), 0.5)["verdict"] == "failed"


def difference(value: float, low: float, high: float = 5.0, samples: int = 400) -> Difference:
    return Difference("accuracy", 0.9, 0.88, 0.92, 0.9 + value / 100, value, low, high, samples)


@pytest.mark.parametrize(
    ("value", "low", "worst", "verdict"),
    [
        (-0.4, -0.9, None, "passed"),
        (-0.4, -1.1, None, "inconclusive"),
        (-0.4, -1.1, 1.2, "passed"),
        (-0.6, -0.7, None, "failed"),
        (-0.6, -0.7, 9.0, "failed"),
        (-0.5, -1.0, None, "passed"),
        (+1.0, -0.5, None, "passed"),
        (+1.0, -1.5, None, "inconclusive"),
    ],
)
def test_the_rule(value: float, low: float, worst: float | None, verdict: str) -> None:
    record = judge_quality(difference(value, low), 0.5, worst)
    assert record["verdict"] == verdict
    assert (record["more_samples_needed"] is not None) == (verdict == "inconclusive")
    assert record["max_drop_worst"] == (worst or 1.0)
    json.dumps(record, allow_nan=False)


def test_a_drop_of_exactly_the_budget_is_inside_it() -> None:
    found = difference((0.7 - 0.705) * 100, -0.9)
    assert -found.difference > 0.5, "by rounding alone"
    assert judge_quality(found, 0.5)["verdict"] == "passed"


def test_more_samples_would_settle_it() -> None:
    found = difference(-0.4, -1.6, samples=400)
    # The bad end is 1.2 away and may be 0.6: four times the samples.
    assert more_samples(found, 1.0) == 1200
    assert more_samples(difference(-1.0, -1.6), 1.0) is None
    assert "about 1200 more samples" in judge_quality(found, 0.5)["reason"]
    settled = difference(-0.4, -1.0, samples=1600)
    assert judge_quality(settled, 0.5)["verdict"] == "passed"
    assert judge_quality(difference(-0.5, -0.6), 0.5, 0.5)["reason"].endswith("no number of samples would settle it")


def test_undefined_metrics_are_inconclusive_and_json() -> None:
    found = paired_bootstrap(SPEARMAN, [1.0] * 10, [1.0] * 10, list(range(10)), resamples=50)
    record = judge_quality(found, 0.5)
    assert record["verdict"] == "inconclusive"
    assert record["original"] is None
    assert "undefined" in record["reason"]
    json.dumps(record, allow_nan=False)
    single = paired_bootstrap(ACCURACY, [1], [1], [1], resamples=50)
    assert judge_quality(single, 0.5)["verdict"] == "inconclusive"


@pytest.mark.parametrize("rows", [2, 36, 367, 368, 1821])
def test_rows_without_a_loss_rule_out_only_what_so_many_can(rows: int) -> None:
    truths = [i % 2 for i in range(rows)]
    original = [1 - t if i % 5 == 0 else t for i, t in enumerate(truths)]
    better = [truths[0], *original[1:]]
    for variant in (original, better):
        plain = judge_quality(paired_bootstrap(ACCURACY, original, variant, truths), 0.5)
        assert plain["verdict"] == "passed"
        found = paired_bootstrap(ACCURACY, original, variant, truths, exact=True)
        # No loss in so many rows has a probability of 2.5 % where the share at the bad end is lost.
        assert (1 + found.low / 100) ** rows == pytest.approx(0.025)
        record = judge_quality(found, 0.5)
        assert record["verdict"] == ("passed" if rows >= 368 else "inconclusive")
        assert record["more_samples_needed"] == (None if rows >= 368 else 368 - rows)
        json.dumps(record, allow_nan=False)


def test_the_exact_bound_is_for_shares_of_right_rows_without_a_loss() -> None:
    original, variant, truths = classified(6, 300)
    assert paired_bootstrap(ACCURACY, original, variant, truths, exact=True) == paired_bootstrap(
        ACCURACY, original, variant, truths
    )
    rows = rated(3, 50)
    assert paired_bootstrap(SPEARMAN, *rows, exact=True) == paired_bootstrap(SPEARMAN, *rows)
    words, answers = ["cat", "dog"], [["cat"], ["bird"]]
    exact = get_metric("exact-match")
    assert paired_bootstrap(exact, words, words, answers, exact=True).bounded
    none = judge_quality(paired_bootstrap(exact, words, words, answers, exact=True), 0.0, 0.0)
    assert (none["verdict"], none["more_samples_needed"]) == ("inconclusive", None)


def test_nonsense_is_refused() -> None:
    with pytest.raises(RequestError, match="budget"):
        judge_quality(difference(0, 0), 1.0, 0.5)
    with pytest.raises(RequestError, match="budget"):
        judge_quality(difference(0, 0), -1.0)
    with pytest.raises(RequestError, match="bootstrap"):
        paired_bootstrap(ACCURACY, [1], [1], [1], confidence=95)
    with pytest.raises(RequestError, match="2 for 1"):
        paired_bootstrap(ACCURACY, [1], [1, 2], [1])
