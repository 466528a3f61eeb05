"""Ranges from streamed histograms, against brute force over the stored values."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.observers import METHODS, Histogram, choose_range, squared_error
from exporter.errors import RequestError


def skewed(seed: int = 0, size: int = 40_000) -> np.ndarray:
    """Like the input of a feed-forward layer: mostly small, a long tail to one side, a few far outliers."""
    rng = np.random.default_rng(seed)
    values = np.concatenate([rng.standard_normal(size) * 0.5, rng.exponential(2.0, size // 4), [19.0, 27.5, -3.25]])
    return values.astype(np.float32)


def filled(values: np.ndarray, bins: int = 2048) -> Histogram:
    return Histogram.empty(float(values.min()), float(values.max()), bins).add(values)


def rounded(values: np.ndarray, low: float, high: float, levels: int = 256) -> np.ndarray:
    step = (high - low) / (levels - 1)
    return np.clip(np.round((values - low) / step), 0, levels - 1) * step + low


def test_counts_are_those_of_numpy() -> None:
    values = skewed()
    found = filled(values)
    counts, _ = np.histogram(values, bins=len(found.counts), range=(found.low, found.high))
    assert found.counts.sum() == values.size
    # float32 places a value that lies on an edge into either bin
    assert np.abs(np.cumsum(found.counts) - np.cumsum(counts)).max() <= 4


def test_parts_merge_to_the_whole_in_any_order() -> None:
    values = skewed()
    low, high = float(values.min()), float(values.max())
    parts = [Histogram.empty(low, high).add(part) for part in np.array_split(values, 5)]
    ahead = parts[0].merge(parts[1]).merge(parts[2].merge(parts[3])).merge(parts[4])
    back = parts[4].merge(parts[3].merge(parts[2].merge(parts[1].merge(parts[0]))))
    assert np.array_equal(ahead.counts, filled(values).counts)
    assert np.array_equal(ahead.counts, back.counts)


def test_histograms_over_other_bins_do_not_merge() -> None:
    with pytest.raises(RequestError, match="cannot be merged"):
        Histogram.empty(0, 1).merge(Histogram.empty(0, 2))


def test_values_outside_count_at_the_ends() -> None:
    found = Histogram.empty(0.0, 1.0, 4).add(np.array([-5.0, 0.1, 0.9, 1.0, 7.0]))
    assert found.counts.tolist() == [2, 0, 0, 3]


@pytest.mark.parametrize("ends", [(0.0, np.inf), (np.nan, 1.0), (2.0, 1.0)])
def test_range_must_be_one(ends: tuple[float, float]) -> None:
    with pytest.raises(RequestError):
        Histogram.empty(*ends)


def test_minmax_keeps_everything() -> None:
    values = skewed()
    assert choose_range(filled(values), "minmax", symmetric=False) == (float(values.min()), float(values.max()))
    bound = float(np.abs(values).max())
    assert choose_range(filled(values), "minmax", symmetric=True) == (-bound, bound)


@pytest.mark.parametrize("percentile", [99.0, 99.9])
def test_percentile_is_that_of_the_stored_values(percentile: float) -> None:
    values = skewed()
    found = filled(values)
    low, high = choose_range(found, "percentile", symmetric=False, percentile=percentile)
    tail = (100 - percentile) / 2
    assert low == pytest.approx(np.percentile(values, tail), abs=2 * found.width)
    assert high == pytest.approx(np.percentile(values, 100 - tail), abs=2 * found.width)
    _, bound = choose_range(found, "percentile", symmetric=True, percentile=percentile)
    assert bound == pytest.approx(np.percentile(np.abs(values), percentile), abs=2 * found.width)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("levels", [16, 256])
def test_mse_is_near_the_best_of_all_ranges(symmetric: bool, levels: int) -> None:
    values = skewed()
    low, high = choose_range(filled(values), "mse", symmetric=symmetric, levels=levels)

    def error(ends: tuple[float, float]) -> float:
        return float(np.mean((rounded(values, *ends, levels=levels) - values) ** 2))

    shares = np.linspace(0.05, 1, 40)
    bound = float(np.abs(values).max())
    tried = (
        [(-bound * s, bound * s) for s in shares]
        if symmetric
        else [(float(values.min()) * a, float(values.max()) * b) for a in shares for b in shares]
    )
    assert error((low, high)) <= 1.05 * min(error(ends) for ends in tried)
    whole = (-bound, bound) if symmetric else (float(values.min()), float(values.max()))
    assert error((low, high)) < error(whole)


def test_squared_error_predicts_that_of_rounding() -> None:
    values = skewed()
    found = filled(values)
    middles = (found.edges[:-1] + found.edges[1:]) / 2
    for ends in ((-2.0, 8.0), (float(values.min()), float(values.max()))):
        told = squared_error(middles, found.counts / found.counts.sum(), ends, 256)
        seen = float(np.mean((rounded(values, *ends) - values) ** 2))
        assert told == pytest.approx(seen, rel=0.1)


def test_entropy_clips_outliers_and_keeps_the_rest() -> None:
    values = np.concatenate([np.random.default_rng(1).standard_normal(100_000), [100.0]]).astype(np.float32)
    low, high = choose_range(filled(values, 8192), "entropy", symmetric=True)
    assert 2.5 < high < 12
    assert low == -high


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_stays_exact(method: str, symmetric: bool) -> None:
    values = np.random.default_rng(2).uniform(3, 5, 10_000).astype(np.float32)
    low, high = choose_range(filled(values), method, symmetric=symmetric)  # type: ignore[arg-type]
    assert low <= 0 <= high


@pytest.mark.parametrize("method", METHODS)
def test_tensor_that_never_changes(method: str) -> None:
    found = Histogram.empty(4.0, 4.0).add(np.full(10, 4.0))
    assert choose_range(found, method, symmetric=False) == (0.0, 4.0)  # type: ignore[arg-type]


def test_nothing_seen() -> None:
    with pytest.raises(RequestError, match="no values"):
        choose_range(Histogram.empty(0, 1), "minmax", symmetric=False)


def test_unknown_method() -> None:
    with pytest.raises(RequestError, match="unknown way"):
        choose_range(Histogram.empty(0, 1).add(np.ones(3)), "median", symmetric=False)  # type: ignore[arg-type]
