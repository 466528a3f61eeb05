"""Statistics of paired timings: ratios with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 4000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ratio:
    """A ratio of two durations with its interval; above one, the second was faster.

    Attributes:
        value: The median of the rounds' ratios.
        low: Lower end of the 95 % bootstrap interval.
        high: Upper end.
        rounds: How many rounds it rests on. With fewer than five the interval covers less than it says, because
            even from the smallest ratio to the largest it would.
    """

    value: float
    low: float
    high: float
    rounds: int

    def to_dict(self) -> dict[str, float | int]:
        return asdict(self)


def paired_ratio(baseline: Sequence[float], other: Sequence[float], *, seed: int) -> Ratio:
    """How many times faster `other` is than `baseline`, from pairs measured in the same round.

    The estimate is the median over rounds of ``baseline[i] / other[i]``: a round that something else disturbed moves
    it little, which a mean would not survive. The interval is the expanded percentile bootstrap over rounds
    (Hesterberg, What Teachers Should Know About the Bootstrap, The American Statistician 69, 2015, section 5.3): with
    ten rounds the plain one would cover the truth in nine cases of ten only.

    Args:
        baseline: One duration per round, in any unit.
        other: As many, in the same unit and of the same rounds.
        seed: Of the resampling.

    Raises:
        ValueError: No round, unequal numbers, or a duration that is not positive.
    """
    ratios = _ratios(baseline, other)
    return _interval(float(np.median(ratios)), _bootstrap(ratios, seed), len(ratios))


def ratio_through(
    baseline: Sequence[float],
    other: Sequence[float],
    baseline_elsewhere: Sequence[float],
    reference: Sequence[float],
    *,
    seed: int,
) -> Ratio:
    """How many times faster `other` is than `reference`, which never ran in the same round.

    Both were paired with the same baseline, each in rounds of its own, so the ratio of their two speed-ups is taken;
    the two bootstrap distributions are independent, and the interval is that of their quotient.

    Args:
        baseline: The baseline's durations in the rounds of `other`.
        other: Durations, one per round.
        baseline_elsewhere: The baseline's durations in the rounds of `reference`.
        reference: Durations, one per round.
        seed: Of the resampling.
    """
    first, second = _ratios(baseline, other), _ratios(baseline_elsewhere, reference)
    quotients = _bootstrap(first, seed) / _bootstrap(second, seed + 1)
    value = float(np.median(first) / np.median(second))
    return _interval(value, quotients, min(len(first), len(second)))


def _ratios(baseline: Sequence[float], other: Sequence[float]) -> np.ndarray:
    first, second = np.asarray(baseline, np.float64), np.asarray(other, np.float64)
    if first.shape != second.shape or first.ndim != 1 or not first.size:
        raise ValueError(f"need as many durations of both, at least one: {first.shape} and {second.shape}")
    if not (np.isfinite(first) & np.isfinite(second) & (first > 0) & (second > 0)).all():
        raise ValueError("durations must be positive and finite")
    return first / second


def _bootstrap(values: np.ndarray, seed: int) -> np.ndarray:
    """Medians of `RESAMPLES` resamples of `values`; shape ``(RESAMPLES,)``."""
    picks = np.random.default_rng(seed).integers(0, len(values), size=(RESAMPLES, len(values)))
    return np.median(values[picks], axis=1)


def _tail(rounds: int) -> float:
    """The share to cut off at each end: a little less than 2.5 %, as resamples spread less than samples do."""
    from scipy.stats import norm, t

    if rounds < 2:
        return 0.0
    return float(norm.cdf(math.sqrt(rounds / (rounds - 1)) * t.ppf((1 - CONFIDENCE) / 2, rounds - 1)))


def _interval(value: float, distribution: np.ndarray, rounds: int) -> Ratio:
    tail = 100 * _tail(rounds)
    low, high = np.percentile(distribution, [tail, 100 - tail])
    return Ratio(value, float(low), float(high), rounds)
