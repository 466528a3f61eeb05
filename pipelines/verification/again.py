"""Quality judged again, on the rows that a bundle carries: a sample of those that it was judged on.

The whole data have shown that a variant keeps its budget. On a sample of them the same variant can lie outside by
chance alone, so that being outside is not enough to fail: the sample's interval has to exclude the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipelines.verification.agreement import Measure, agreement, judge_agreement
from pipelines.verification.quality import Difference, judge_quality

_RESAMPLES = 100  # only where a measure fails
_TAIL = 0.025


def judge_quality_again(found: Difference, max_drop: float, max_drop_worst: float | None) -> dict[str, Any]:
    """The verdict record of quality on labelled rows of a bundle.

    It passes when the drop is at most `max_drop`, fails when all of its interval is larger, and is inconclusive where
    the interval holds both (or the metric is undefined).

    Args:
        found: The paired difference on the bundle's rows.
        max_drop: In points.
        max_drop_worst: In points, as the record shows it.
    """
    record = judge_quality(found, max_drop, max_drop_worst)
    if record["original"] is None or record["difference"] is None or record["high"] is None:
        return record
    seen = (
        f"{found.difference:+.2f} points ({found.low:+.2f} to {found.high:+.2f}) on the bundle's {found.samples} rows"
    )
    if record["verdict"] != "failed":
        return record | {
            "verdict": "passed",
            "reason": f"{seen}, {max_drop:g} may be lost",
            "more_samples_needed": None,
        }
    if found.high < -max_drop:
        return record
    return record | {"verdict": "inconclusive", "reason": f"{seen}: so few do not tell whether {max_drop:g} are lost"}


def judge_agreement_again(
    task: str, original: Sequence[Any], variant: Sequence[Any], samples: int, *, problem: str = "", seed: int = 0
) -> dict[str, Any]:
    """The verdict record of agreement on a bundle's rows: a measure fails when its whole interval is below its limit.

    Args:
        task: Name of the task.
        original: The original's predictions.
        variant: The variant's.
        samples: How many rows they are of.
        problem: The ``problem_type`` of the model's configuration.
        seed: Of the resampling, which is over rows.
    """
    measures = agreement(task, original, variant, problem=problem)
    if any(_may_be_chance(measure) for measure in measures):
        drawn = _resampled(task, original, variant, problem, seed)
        measures = [_excused(measure, [d[i] for d in drawn]) for i, measure in enumerate(measures)]
    return judge_agreement(measures, samples, "of the bundle")


def _may_be_chance(measure: Measure) -> bool:
    # Without a value it is broken: no other rows would mend it.
    return measure.verdict == "failed" and measure.value is not None and measure.threshold is not None


def _resampled(
    task: str, original: Sequence[Any], variant: Sequence[Any], problem: str, seed: int
) -> list[list[Measure]]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(_RESAMPLES):
        rows = rng.integers(0, len(original), len(original))
        sides = [original[i] for i in rows], [variant[i] for i in rows]
        found.append(agreement(task, *sides, problem=problem))
    return found


def _excused(measure: Measure, drawn: Sequence[Measure]) -> Measure:
    if not _may_be_chance(measure) or measure.threshold is None:
        return measure
    values = [other.value for other in drawn if other.value is not None]
    if not values or float(np.quantile(values, 1 - _TAIL)) < measure.threshold:
        return measure
    return replace(measure, name=f"{measure.name}, which so few rows leave open:", verdict="inconclusive")
