"""Selection: which passed variant to use, per operating point and overall."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from exporter.artifact import PRECISIONS, Variant

OVERALL = "overall"


@dataclass(frozen=True)
class Candidate:
    """A variant that passed its gates.

    Attributes:
        variant: Which.
        portable: It runs wherever its runtime does (an engine does not).
        speedups: Operating point to the interval (low, high) of its speed-up; all are against the same.
    """

    variant: Variant
    portable: bool
    speedups: Mapping[str, tuple[float, float]]

    @property
    def complexity(self) -> tuple[int, bool, bool, str]:
        """Smaller is simpler: FP32 before int8, portable ONNX before an engine, plain before a special form."""
        return (
            PRECISIONS.index(self.variant.precision),
            not self.portable,
            self.variant.form is not None,
            self.variant.target,
        )


def select(candidates: Sequence[Candidate], points: Sequence[str]) -> dict[str, str | None]:
    """Choose a variant for each operating point and one overall.

    At a point the best lower bound of the speed-up wins; overall it is the best geometric mean of lower bounds. Where
    another candidate's interval overlaps the winner's, the simpler of them is chosen.

    Args:
        candidates: Passed variants only.
        points: Operating points, as ``1x32``. Without any timing the simplest candidate is chosen.

    Returns:
        ``"overall"`` and each point to a variant's id, or ``None`` where there is no candidate.
    """
    chosen: dict[str, str | None] = {}
    for point in points:
        timed = [(c, c.speedups[point]) for c in candidates if point in c.speedups]
        chosen[point] = _best(timed) if timed else _simplest(candidates)
    means = [(c, _geometric(c, points)) for c in candidates if points and all(p in c.speedups for p in points)]
    overall = _best(means) if means else _simplest(candidates)
    return {OVERALL: overall, **chosen}


def _best(timed: Sequence[tuple[Candidate, tuple[float, float]]]) -> str:
    best_low = max(low for _, (low, _) in timed)
    level = [candidate for candidate, (_, high) in timed if high >= best_low]
    return min(level, key=lambda candidate: candidate.complexity).variant.id


def _simplest(candidates: Sequence[Candidate]) -> str | None:
    return min(candidates, key=lambda c: c.complexity).variant.id if candidates else None


def _geometric(candidate: Candidate, points: Sequence[str]) -> tuple[float, float]:
    lows, highs = zip(*(candidate.speedups[point] for point in points), strict=True)
    return math.exp(sum(map(math.log, lows)) / len(lows)), math.exp(sum(map(math.log, highs)) / len(highs))
