from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.verification.statistics import paired_ratio, ratio_through

DURATIONS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30)


def test_the_ratio_is_paired_so_that_common_drift_cancels() -> None:
    drift = np.linspace(1, 50, 12)
    ratio = paired_ratio(6 * drift, 2 * drift, seed=0)
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((3, 3, 3))
    assert ratio.rounds == 12


def test_one_disturbed_round_moves_the_ratio_little() -> None:
    baseline, other = [3.0] * 11, [1.0] * 11
    other[4] = 40.0
    ratio = paired_ratio(baseline, other, seed=0)
    assert ratio.value == 3
    assert ratio.low == 3


@pytest.mark.parametrize("rounds", [5, 8, 15])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(rounds: int) -> None:
    generator = np.random.default_rng(7)
    truth, trials = 2.0, 400
    covered = 0
    for trial in range(trials):
        noise = generator.lognormal(0, 0.1, size=(2, rounds))
        ratio = paired_ratio(truth * noise[0], noise[1], seed=trial)
        covered += ratio.low <= truth <= ratio.high
    assert 0.92 <= covered / trials <= 0.995


def test_a_ratio_through_the_baseline_covers_the_truth_too() -> None:
    generator = np.random.default_rng(8)
    covered = 0
    for trial in range(200):
        noise = generator.lognormal(0, 0.1, size=(4, 15))
        ratio = ratio_through(12 * noise[0], 2 * noise[1], 12 * noise[2], 4 * noise[3], seed=trial)
        covered += ratio.low <= 2.0 <= ratio.high
    assert 0.90 <= covered / 200 <= 1.0


@given(DURATIONS, st.floats(0.01, 100), st.integers(0, 100))
def test_the_estimate_lies_in_its_interval_and_swapping_inverts_it(
    durations: list[float], factor: float, seed: int
) -> None:
    baseline = [d * factor for d in durations]
    ratio = paired_ratio(baseline, durations[::-1], seed=seed)
    assert ratio.low <= ratio.value * (1 + 1e-9)
    assert ratio.value <= ratio.high * (1 + 1e-9)
    assert ratio == paired_ratio(baseline, durations[::-1], seed=seed)
    one = paired_ratio(baseline, durations, seed=seed)
    assert one.value == pytest.approx(factor)


@pytest.mark.parametrize(
    ("baseline", "other"), [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0]), ([1.0], [-1.0]), ([float("nan")], [1.0])]
)
def test_impossible_durations_are_refused(baseline: list[float], other: list[float]) -> None:
    with pytest.raises(ValueError):
        paired_ratio(baseline, other, seed=0)
