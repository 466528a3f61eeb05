"""Ranges of activations from streamed statistics: histograms that merge, and the ways to choose a range from one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from exporter.errors import RequestError

Array = np.ndarray
Method = Literal["minmax", "percentile", "entropy", "mse"]
BINS = 2048
"""Bins of a histogram: 16 KiB a tensor, whatever the number of samples."""
PERCENTILE = 99.99
CANDIDATES = 128
"""Ranges that entropy and MSE try, from a few bins around the most frequent values to the whole histogram."""


@dataclass(frozen=True)
class Histogram:
    """How often a tensor took values, in equal bins over a range fixed beforehand.

    Counts are integers, so merging is exact, associative and commutative: calibration split over processes gives the
    same histogram as one process.

    Attributes:
        low: Left end of the first bin.
        high: Right end of the last bin (its values included); not below `low`. Equal ends: a tensor that never
            changes.
        counts: int64 (bins,).
    """

    low: float
    high: float
    counts: Array

    @classmethod
    def empty(cls, low: float, high: float, bins: int = BINS) -> Histogram:
        """No values yet.

        Raises:
            RequestError: The range is not finite, or its ends are in the wrong order.
        """
        if not (np.isfinite(low) and np.isfinite(high) and low <= high and bins >= 1):
            raise RequestError("a histogram needs a finite range and at least one bin", (low, high, bins), "Check them")
        return cls(float(low), float(high), np.zeros(bins, dtype=np.int64))

    @property
    def width(self) -> float:
        """Width of a bin."""
        return (self.high - self.low) / len(self.counts)

    @property
    def edges(self) -> Array:
        """float64 (bins + 1,)."""
        return np.linspace(self.low, self.high, len(self.counts) + 1)

    def add(self, values: Array) -> Histogram:
        """With the values of a float array of any shape counted too; those outside count in the outermost bins."""
        counted = _count(values, self.low, self.high, len(self.counts))
        return Histogram(self.low, self.high, self.counts + counted)

    def merge(self, other: Histogram) -> Histogram:
        """The histogram of both.

        Raises:
            RequestError: They are over different bins.
        """
        if (self.low, self.high, len(self.counts)) != (other.low, other.high, len(other.counts)):
            raise RequestError(
                "histograms over different bins cannot be merged",
                f"{self.low}..{self.high} and {other.low}..{other.high}",
                "Take both over the ranges of one range pass",
            )
        return Histogram(self.low, self.high, self.counts + other.counts)


def _count(values: Array, low: float, high: float, bins: int) -> Array:
    flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
    if low == high:
        counts = np.zeros(bins, dtype=np.int64)
        counts[0] = flat.size
        return counts
    place = (flat - np.float32(low)) * np.float32(bins / (high - low))
    np.clip(place, 0, bins - 1, out=place)  # clips the right end into the last bin
    return np.bincount(place.astype(np.int32), minlength=bins).astype(np.int64)


def choose_range(
    histogram: Histogram,
    method: Method,
    *,
    symmetric: bool,
    levels: int = 256,
    percentile: float = PERCENTILE,
) -> tuple[float, float]:
    """The range of values that quantization should keep apart; what lies outside is clipped.

    Args:
        histogram: Of the tensor.
        method: ``minmax`` keeps everything. ``percentile`` clips an equal share at both ends. ``entropy`` makes the
            quantized distribution diverge least from the original one (Kullback-Leibler; S. Migacz, "8-bit Inference
            with TensorRT", 2017). ``mse`` makes the mean squared error of rounding and clipping least.
        symmetric: The range has to be symmetric about zero.
        levels: Numbers that the integer type tells apart in the range.
        percentile: Share of values to keep, in percent.

    Returns:
        Low and high, with zero between them: padding and masks have to stay exact.

    Raises:
        RequestError: The histogram is empty, or there is no such method.
    """
    if histogram.counts.sum() == 0:
        raise RequestError("no values were seen", method, "Give at least one calibration sample")
    if method not in _METHODS:
        raise RequestError("unknown way to choose a range", method, f"Choose one of: {', '.join(_METHODS)}")
    if histogram.low == histogram.high:
        low, high = histogram.low, histogram.high
    else:
        low, high = _METHODS[method](histogram, symmetric, levels, percentile)
    if symmetric:
        bound = max(abs(low), abs(high))
        return -bound, bound
    return min(low, 0.0), max(high, 0.0)


def _minmax(histogram: Histogram, symmetric: bool, levels: int, percentile: float) -> tuple[float, float]:
    return histogram.low, histogram.high


def _percentile(histogram: Histogram, symmetric: bool, levels: int, percentile: float) -> tuple[float, float]:
    edges, total = histogram.edges, int(histogram.counts.sum())
    if symmetric:
        sides = _folded(histogram)
        kept = int(np.searchsorted(np.cumsum(sides.counts), total * percentile / 100))
        bound = sides.edges[min(kept, len(sides.counts) - 1) + 1]
        return -bound, bound
    tail = total * (1 - percentile / 100) / 2
    seen = np.cumsum(histogram.counts)
    first = int(np.searchsorted(seen, tail, side="right"))
    last = int(np.searchsorted(seen, total - tail))
    return float(edges[first]), float(edges[min(last, len(histogram.counts) - 1) + 1])


def _folded(histogram: Histogram) -> Histogram:
    """The histogram of absolute values, by the middles of the bins."""
    bound = max(abs(histogram.low), abs(histogram.high))
    middles = (histogram.edges[:-1] + histogram.edges[1:]) / 2
    bins = len(histogram.counts)
    place = np.minimum((np.abs(middles) * (bins / bound)).astype(np.int64), bins - 1)
    counts = np.bincount(place, weights=histogram.counts, minlength=bins).astype(np.int64)
    return Histogram(0.0, bound, counts)


def _candidates(histogram: Histogram, symmetric: bool) -> list[tuple[float, float]]:
    """Ranges to try, the widest first: the whole one shrunk step by step, about zero or towards the mode."""
    shares = np.linspace(1.0, 1 / CANDIDATES, CANDIDATES)
    if symmetric:
        bound = max(abs(histogram.low), abs(histogram.high))
        return [(-bound * s, bound * s) for s in shares]
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    return (
        [(low * a, high * b) for a in shares[::4] for b in shares[::4]]
        if low < 0 < high
        else [(low * s, high * s) for s in shares]
    )


def _mse(histogram: Histogram, symmetric: bool, levels: int, percentile: float) -> tuple[float, float]:
    middles = (histogram.edges[:-1] + histogram.edges[1:]) / 2
    weights = histogram.counts / histogram.counts.sum()
    return min(_candidates(histogram, symmetric), key=lambda ends: squared_error(middles, weights, ends, levels))


def squared_error(values: Array, weights: Array, ends: tuple[float, float], levels: int) -> float:
    """Mean squared error of quantizing `values` (with `weights` that add up to 1) to `levels` numbers over a range.

    Rounding errs evenly over a step: its mean square is step²/12. What is clipped errs by its distance to the range.
    """
    low, high = ends
    step = (high - low) / (levels - 1)
    beyond = np.maximum(values - high, 0) + np.maximum(low - values, 0)
    inside = beyond == 0
    return float(np.sum(weights * np.where(inside, step**2 / 12, beyond**2)))


def _entropy(histogram: Histogram, symmetric: bool, levels: int, percentile: float) -> tuple[float, float]:
    work = _folded(histogram) if symmetric else histogram
    if symmetric:
        levels = levels // 2
    best, chosen = np.inf, (work.low, work.high)
    edges = work.edges
    for low, high in _entropy_spans(work, levels):
        divergence = _divergence(work.counts, low, high, levels)
        if divergence < best:
            best, chosen = divergence, (float(edges[low]), float(edges[high]))
    return (-chosen[1], chosen[1]) if symmetric else chosen


def _entropy_spans(histogram: Histogram, levels: int) -> list[tuple[int, int]]:
    """Spans of bins to try, at least as many bins as levels, each about the value that stays: zero."""
    bins = len(histogram.counts)
    zero = int(np.clip(np.searchsorted(histogram.edges, 0.0), 0, bins))
    spans = []
    for share in np.linspace(1.0, levels / bins, CANDIDATES):
        low = int(np.floor(zero * (1 - share)))
        high = int(np.ceil(zero + (bins - zero) * share))
        spans.append((low, max(high, min(bins, low + levels))))
    return list(dict.fromkeys(spans))


def _divergence(counts: Array, low: int, high: int, levels: int) -> float:
    """Kullback-Leibler divergence of the clipped distribution from its quantized form."""
    p = counts[low:high].astype(np.float64)
    inside = p.copy()
    p[0] += counts[:low].sum()
    p[-1] += counts[high:].sum()
    group = np.minimum(np.arange(len(p)) * levels // len(p), levels - 1)
    occupied = p > 0
    sums = np.bincount(group, weights=inside, minlength=levels)
    filled = np.bincount(group, weights=occupied, minlength=levels)
    q = np.where(occupied, sums[group] / np.maximum(filled[group], 1), 0.0)
    if q.sum() == 0:
        return np.inf
    p, q = p / p.sum(), q / q.sum()
    # An end that only holds what was clipped has no mass in q: smoothed, it costs much and not everything.
    q = np.where(occupied & (q == 0), 1e-12, q)
    return float(np.sum(p[occupied] * np.log(p[occupied] / q[occupied])))


_METHODS: dict[str, Callable[[Histogram, bool, int, float], tuple[float, float]]] = {
    "minmax": _minmax,
    "percentile": _percentile,
    "entropy": _entropy,
    "mse": _mse,
}
METHODS = tuple(_METHODS)
