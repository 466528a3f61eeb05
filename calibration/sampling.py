"""Choosing rows from data, by seed: subsets that keep the spread of lengths, or of contents too; positions to mask."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.content import WIDTH, content_vector, farthest
from exporter.errors import RequestError

if TYPE_CHECKING:
    from calibration.datasets import Dataset

Array = np.ndarray
STRATA = 8
POOL = 8192
"""Rows that are looked at for their contents: 8 MiB of vectors, whatever the size of the data."""
MOST_BY_CONTENT = POOL // 2
"""Larger subsets are drawn by length alone: they have some of everything, and to compare takes time by their square."""


def stratified_subset(
    lengths: Sequence[int] | np.ndarray, count: int, *, seed: int = 0, strata: int = STRATA
) -> list[int]:
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
    _refuse_none(count, strata)
    total = len(lengths)
    if count >= total:
        return list(range(total))
    rng = np.random.default_rng(seed)
    chosen = [rng.choice(part, size=share, replace=False) for part, share in _strata(lengths, count, rng, strata)]
    return sorted(int(i) for i in np.concatenate(chosen))


def _refuse_none(count: int, strata: int = STRATA) -> None:
    if count < 1 or strata < 1:
        raise RequestError("a subset needs at least one row and one stratum", min(count, strata), "Ask for more")


def _strata(
    lengths: Sequence[int] | np.ndarray, count: int, rng: np.random.Generator, strata: int
) -> list[tuple[Array, int]]:
    """Rows by length, in parts of (nearly) equal size, and how many of the `count` rows each part gives."""
    total = len(lengths)
    # Equal lengths are shuffled among themselves, so that the file's order (often by topic) does not choose.
    order = np.lexsort((rng.random(total), np.asarray(lengths)))
    parts = np.array_split(order, min(strata, count))
    # Cumulative rounding gives each part its share within one row, and exactly `count` together.
    ends = np.round(np.cumsum([len(part) for part in parts]) * count / total).astype(int)
    return [(part, int(share)) for part, share in zip(parts, np.diff(ends, prepend=0), strict=True)]


def calibration_subset(data: Dataset, count: int, *, seed: int = 0) -> list[int]:
    """Indices of `count` rows, in order, that are spread over the lengths of the data and differ in what they say.

    Of each part of the lengths (see `stratified_subset`) those rows are taken that are least like the ones before:
    ranges are set by what is rare, and a row that nearly repeats another teaches nothing. Rows without text (pictures,
    tensors) are drawn by length alone, and so are more than `MOST_BY_CONTENT` rows.

    The data are read once, and at most `POOL` rows (or twice `count`), drawn evenly at random, are candidates: memory
    does not grow with the number of rows.

    Args:
        data: What to choose from.
        count: Rows wanted; all rows if there are not more.
        seed: Of the draws.

    Raises:
        RequestError: `count` is below 1.
    """
    _refuse_none(count)
    if count >= len(data):
        return list(range(len(data)))
    by_content = count <= MOST_BY_CONTENT
    pool = draw_candidates(data, max(POOL, 2 * count), seed=seed, with_vectors=by_content)
    if pool.vectors is None:
        chosen = stratified_subset(pool.lengths, count, seed=seed)
    else:
        rng = np.random.default_rng(seed)
        parts = _strata(pool.lengths, count, rng, STRATA)
        chosen = farthest(pool.vectors, [(rng.permutation(part), share) for part, share in parts])
    return sorted(int(i) for i in pool.indices[chosen])


@dataclass(frozen=True)
class Candidates:
    """Rows that a subset may be chosen from.

    Attributes:
        indices: Their places in the data, int64 (candidates,).
        lengths: See `text_length`, int64 (candidates,).
        vectors: See `content_vector`, float32 (candidates, WIDTH); ``None`` where there is no text, or none are asked.
    """

    indices: Array
    lengths: Array
    vectors: Array | None


def draw_candidates(
    rows: Iterable[Mapping[str, Any]], size: int, *, seed: int = 0, with_vectors: bool = True
) -> Candidates:
    """At most `size` rows, each with the same chance: a reservoir, that holds no more however many rows pass.

    While the rows fit, they are all in it, in order (J. Vitter, "Random Sampling with a Reservoir", 1985, algorithm R).
    """
    rng = np.random.default_rng((seed, 1))  # not the numbers that the choice among the candidates draws
    indices, lengths = np.zeros(size, np.int64), np.zeros(size, np.int64)
    vectors = np.zeros((size, WIDTH), np.float32) if with_vectors else None
    count = 0
    for index, row in enumerate(rows):
        count += 1
        place = index if index < size else int(rng.integers(count))
        if place >= size:
            continue
        indices[place], lengths[place] = index, text_length(row)
        vector = None if vectors is None else content_vector(row)
        if vector is None:
            vectors = None  # a data set's rows have the same roles: where one has no text, none has
        elif vectors is not None:
            vectors[place] = vector
    held = min(size, count)
    return Candidates(indices[:held], lengths[:held], None if vectors is None else vectors[:held])


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
