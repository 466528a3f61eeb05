"""Choosing rows from data, by seed: subsets that keep the spread of lengths, and positions to mask."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from exporter.errors import RequestError


def stratified_subset(lengths: Sequence[int] | np.ndarray, count: int, *, seed: int = 0, strata: int = 8) -> list[int]:
    """Indices of `count` rows, in order, that are spread over the lengths as all rows are.

    The rows are sorted by length and cut into `strata` parts of (nearly) equal size; each gives its share, drawn at
    random. A plain draw of a few rows often has none of the rare long ones, which set the ranges of activations.

    Args:
        lengths: One length per row, in any unit.
        count: Rows wanted; all rows if there are not more.
        seed: Of the draw.
        strata: Parts; fewer where `count` is smaller.

    Raises:
        RequestError: `count` or `strata` is below 1.
    """
    if count < 1 or strata < 1:
        raise RequestError("a subset needs at least one row and one stratum", min(count, strata), "Ask for more")
    total = len(lengths)
    if count >= total:
        return list(range(total))
    rng = np.random.default_rng(seed)
    # Equal lengths are shuffled among themselves, so that the file's order (often by topic) does not choose.
    order = np.lexsort((rng.random(total), np.asarray(lengths)))
    parts = np.array_split(order, min(strata, count))
    # Cumulative rounding gives each part its share within one row, and exactly `count` together.
    ends = np.round(np.cumsum([len(part) for part in parts]) * count / total).astype(int)
    shares = np.diff(ends, prepend=0)
    chosen = [rng.choice(part, size=share, replace=False) for part, share in zip(parts, shares, strict=True)]
    return sorted(int(i) for i in np.concatenate(chosen))


def text_length(row: Mapping[str, Any]) -> int:
    """How long the texts of a row of data are, in characters (words where they are split); 0 where it has none."""
    return sum(len(value) for value in row.values() if isinstance(value, str | list))


def positions_to_mask(
    input_ids: np.ndarray, special_ids: Collection[int], *, seed: int, fraction: float = 0.15
) -> np.ndarray:
    """Positions of one encoded text that a fill-mask evaluation hides, the same for every model and variant.

    Args:
        input_ids: Shape (length,), integer.
        special_ids: Ids that are never hidden (class, separator, padding tokens).
        seed: Of the draw; give every row its own, as ``seed + row``.
        fraction: Share of the ordinary tokens to hide; at least one is.

    Returns:
        Sorted positions, shape (n,), int64; empty where the text has no ordinary token.
    """
    ordinary = np.flatnonzero(~np.isin(input_ids, list(special_ids)))
    if ordinary.size == 0:
        return ordinary
    count = max(1, round(fraction * ordinary.size))
    return np.sort(np.random.default_rng(seed).choice(ordinary, size=count, replace=False))
