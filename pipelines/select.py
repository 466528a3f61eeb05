"""Selection: which passed variant to use, per operating point and overall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from exporter.artifact import PRECISIONS, Variant
from pipelines.verification.latency_result import Rounds, compare, geometric_mean

OVERALL = "overall"


@dataclass(frozen=True)
class Candidate:
    """A variant that passed its gates.

    Attributes:
        variant: Which.
        portable: It runs wherever its runtime does (an engine does not).
        rounds: Operating point to the durations of each round.
    """

    variant: Variant
    portable: bool
    rounds: Mapping[str, Rounds] = field(default_factory=dict)

    @property
    def complexity(self) -> tuple[int, bool, bool, str]:
        """Smaller is simpler: FP32 before int8, portable ONNX before an engine, plain before a special form."""
        return (
            PRECISIONS.index(self.variant.precision),
            not self.portable,
            self.variant.form is not None,
            self.variant.target,
        )


def select(
    candidates: Sequence[Candidate], points: Sequence[str], baseline: Mapping[str, Rounds], *, seed: int = 0
) -> dict[str, str | None]:
    """Choose a variant for each operating point and one overall.

    At a point the best lower bound of the speed-up over the baseline leads; overall, that of the geometric mean of each
    round's durations over the points. The simplest is chosen of the leader and those that are not certainly slower: the
    interval of the ratio between the two, in the rounds that they shared, includes 1. (Their speed-ups may overlap all
    the same: what disturbs the baseline widens the intervals of all, and tells nothing about any two of them.)

    Args:
        candidates: Passed variants only, of equally simple ones the simpler first.
        points: Operating points, as ``1x32``. Without any timing the simplest candidate is chosen.
        baseline: Operating point to the baseline's durations; empty where there is none.
        seed: Of the bootstrap.

    Returns:
        ``"overall"`` and each point to a variant's id, or ``None`` where there is no candidate.
    """
    chosen = {point: _best(candidates, [point], baseline, seed) for point in points}
    return {OVERALL: _best(candidates, points, baseline, seed), **chosen}


def _best(
    candidates: Sequence[Candidate], points: Sequence[str], baseline: Mapping[str, Rounds], seed: int
) -> str | None:
    def at(rounds: Mapping[str, Rounds]) -> Rounds:
        return geometric_mean([rounds.get(point, {}) for point in points])

    reference = at(baseline)
    durations = [(candidate, at(candidate.rounds)) for candidate in candidates]
    speedups = [(*entry, compare(reference, entry[1], reference, seed=seed)) for entry in durations]
    timed = [(candidate, rounds, speedup.low) for candidate, rounds, speedup in speedups if speedup is not None]
    if not timed:
        return min(candidates, key=lambda c: c.complexity).variant.id if candidates else None
    _, fastest, _ = max(timed, key=lambda entry: entry[2])

    def is_slower(rounds: Rounds) -> bool:  # the fastest is level with itself
        lead = compare(rounds, fastest, reference, seed=seed)
        return lead is not None and lead.low > 1

    return min((c for c, rounds, _ in timed if not is_slower(rounds)), key=lambda c: c.complexity).variant.id
