"""What a report tells of each step: its record without what the table of models has, with curves of bounded length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MOST_POINTS = 200
"""Of a training curve; the evidence has all."""
_CURVES = ("losses", "evaluations")


def brief_steps(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The steps of `pipelines.compress.summary.Compression.evidence`, for the report.

    Returns:
        For each its ``name`` and what its record has but ``size``.
    """
    return [{"name": step["name"], **_brief(step["record"])} for step in steps if step["record"]]


def _brief(record: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in record.items() if key != "size"}
    training = kept.get("training")
    if training is not None:
        kept["training"] = {key: thinned(value) if key in _CURVES else value for key, value in training.items()}
    return kept


def thinned(points: Sequence[Any], most: int = MOST_POINTS) -> list[Any]:
    """At most so many of the points, evenly spread, with the first and the last.

    >>> thinned([0, 1, 2, 3, 4, 5, 6], 3)
    [0, 3, 6]
    """
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]
