"""The quality gate: the task metric as a paired difference to the original, with a bootstrap interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from exporter.errors import RequestError
from pipelines.verification.metrics import Metric

Array = np.ndarray
_CHUNK_ELEMENTS = 1 << 21  # resamples x rows that are held at once
_ROUNDING = 1e-9  # points: a drop of exactly the budget is inside it, however the subtraction rounds
POINTS = 100.0
"""A metric of 1 is 100 points."""


@dataclass(frozen=True)
class Difference:
    """A variant's metric beside the original's, on the same rows.

    Attributes:
        metric: Its name.
        original: The original's value (not in points).
        original_low: Lower end of its interval.
        original_high: Upper end of its interval.
        variant: The variant's value.
        difference: Variant minus original, in points.
        low: Lower end of the difference's interval, in points.
        high: Upper end of the difference's interval, in points.
        samples: Rows.
        bounded: `low` is the exact bound where no row got worse, see `paired_bootstrap`.
    """

    metric: str
    original: float
    original_low: float
    original_high: float
    variant: float
    difference: float
    low: float
    high: float
    samples: int
    bounded: bool = False


def paired_bootstrap(
    metric: Metric,
    original: Sequence[Any],
    variant: Sequence[Any],
    truths: Sequence[Any],
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    exact: bool = False,
) -> Difference:
    """The difference of two models' metric on the same rows, with a percentile interval over resampled rows.

    Both models are looked at on the same resamples, so that what makes a row hard for both cancels out (B. Efron and
    R. Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 8 and 13). The result depends on nothing but the
    arguments.

    Where not one row got worse every resample says that none does, however few the rows are. With `exact` the lower
    end is then what so many rows can rule out: of `n` rows without a loss, a share of ``1 - tail ** (1 / n)`` may yet
    be lost (J. Hanley and A. Lippman-Hand, "If nothing goes wrong, is everything all right?", JAMA 249, 1983).

    Args:
        metric: What is compared.
        original: The original's predictions, one per row, as the metric takes them.
        variant: The variant's.
        truths: The rows' labels.
        resamples: Number of resamples.
        confidence: Of the intervals.
        seed: Of the resampling.
        exact: Bound a loss that no row shows, for metrics that are a share of right rows.

    Raises:
        RequestError: The numbers of rows differ, or there are none.
    """
    if not 0 < confidence < 1 or resamples < 1:
        raise RequestError("not a bootstrap", f"{resamples} resamples at {confidence}", "Use for example 2000 at 0.95")
    of_original, of_variant = metric.over(original, truths), metric.over(variant, truths)
    rows = len(truths)
    values = np.empty((2, resamples))
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK_ELEMENTS // rows)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        weights = _draw(rng, count, rows)
        values[0, start : start + count] = of_original(weights)
        values[1, start : start + count] = of_variant(weights)
    everything = np.ones((1, rows))
    first, second = float(of_original(everything)[0]), float(of_variant(everything)[0])
    low, high = _interval(values[1] - values[0], confidence)
    bounded = (
        exact and metric.hits is not None and not (metric.hits(original, truths) & ~metric.hits(variant, truths)).any()
    )
    if bounded:
        low = min(low, -(1 - ((1 - confidence) / 2) ** (1 / rows)))
    original_low, original_high = _interval(values[0], confidence)
    return Difference(
        metric=metric.name,
        original=first,
        original_low=original_low,
        original_high=original_high,
        variant=second,
        difference=(second - first) * POINTS,
        low=low * POINTS,
        high=high * POINTS,
        samples=rows,
        bounded=bounded,
    )


def judge_quality(found: Difference, max_drop: float, max_drop_worst: float | None = None) -> dict[str, Any]:
    """The verdict record of quality on labelled data, as the report has it.

    It passes when the drop is at most `max_drop` and the bad end of its interval at most `max_drop_worst`, fails when
    the drop is larger than `max_drop`, and is inconclusive otherwise: then it says how many more samples would settle
    it if nothing but the interval's width changed, which shrinks with the root of their number.

    Args:
        found: The paired difference.
        max_drop: In points.
        max_drop_worst: In points; twice `max_drop` by default.

    Raises:
        RequestError: The budgets are negative or contradict each other.
    """
    worst = 2 * max_drop if max_drop_worst is None else max_drop_worst
    if max_drop < 0 or worst < max_drop:
        raise RequestError(
            "not a quality budget", f"{max_drop} and {worst}", "0 <= max_drop <= max_drop_worst, in points"
        )
    record = {
        "metric": found.metric,
        "original": found.original,
        "original_low": found.original_low,
        "original_high": found.original_high,
        "variant": found.variant,
        "difference": found.difference,
        "low": found.low,
        "high": found.high,
        "max_drop": max_drop,
        "max_drop_worst": worst,
        "samples": found.samples,
        "more_samples_needed": None,
        "measures": [],
    }
    seen = f"{found.difference:+.2f} points ({found.low:+.2f} to {found.high:+.2f}) on {found.samples} rows"
    figures = (found.original, found.variant, found.low, found.high)
    if not all(math.isfinite(figure) for figure in figures):
        reason = f"{found.metric} is undefined on these rows (constant labels or predictions)"
        return record | {"verdict": "inconclusive", "reason": reason} | _without_nan(record)
    if found.samples < 2:
        return record | {"verdict": "inconclusive", "reason": "a single row has no interval"}
    drop = -found.difference
    if drop > max_drop + _ROUNDING:
        return record | {"verdict": "failed", "reason": f"{seen}, at most {max_drop:g} may be lost"}
    if -found.low <= worst + _ROUNDING:
        return record | {"verdict": "passed", "reason": f"{seen}, {max_drop:g} may be lost, {worst:g} at worst"}
    more = more_samples(found, worst)
    settle = "no number of samples would settle it" if more is None else f"about {more} more samples would settle it"
    reason = f"{seen}: {-found.low:.2f} points may be lost, at worst {worst:g} are allowed; {settle}"
    return record | {"verdict": "inconclusive", "reason": reason, "more_samples_needed": more}


def more_samples(found: Difference, worst: float) -> int | None:
    """Samples to add until the interval's bad end is inside `worst`; ``None`` where the drop itself leaves no room.

    The distance of the bad end from the estimate is taken to shrink with the root of the number of samples, and with
    the number itself where no row got worse.
    """
    if found.bounded:
        # (1 - share) ** samples is the same tail for every number of samples.
        needed = found.samples * math.log1p(found.low / POINTS) / math.log1p(-worst / POINTS) if worst else math.inf
        return max(1, math.ceil(needed - _ROUNDING) - found.samples) if needed < math.inf else None
    room = worst + found.difference
    if room <= 0:
        return None
    width = found.difference - found.low
    return max(1, math.ceil(found.samples * (width / room) ** 2 - _ROUNDING) - found.samples)


def _draw(rng: np.random.Generator, count: int, rows: int) -> Array:
    """How often each row is drawn in each of `count` resamples of `rows` rows, float64 (count, rows)."""
    drawn = rng.integers(0, rows, (count, rows)) + np.arange(count)[:, None] * rows
    return np.bincount(drawn.ravel(), minlength=count * rows).reshape(count, rows).astype(np.float64)


def _interval(values: Array, confidence: float) -> tuple[float, float]:
    """Percentiles over the resamples in which the metric is defined; NaN where it hardly ever is."""
    defined = values[np.isfinite(values)]
    if defined.size < 0.9 * values.size:
        return math.nan, math.nan
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return float(low), float(high)


def _without_nan(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: what is undefined is null."""
    return {key: None for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)}
