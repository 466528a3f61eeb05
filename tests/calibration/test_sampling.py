from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration import sampling
from calibration.content import WIDTH
from calibration.datasets import Dataset, make_dataset
from calibration.defaults import default_images
from calibration.sampling import (
    calibration_subset,
    draw_candidates,
    positions_to_mask,
    stratified_subset,
    text_length,
)
from exporter.errors import RequestError


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=200), st.integers(1, 250), st.integers(0, 9), st.integers(1, 9)
)
def test_it_is_a_subset_of_the_asked_size(lengths: list[int], count: int, seed: int, strata: int) -> None:
    chosen = stratified_subset(lengths, count, seed=seed, strata=strata)
    assert len(chosen) == min(count, len(lengths)) == len(set(chosen))
    assert chosen == sorted(chosen)
    assert all(0 <= i < len(lengths) for i in chosen)
    assert chosen == stratified_subset(lengths, count, seed=seed, strata=strata)


def test_every_stratum_gives_its_share() -> None:
    lengths = np.arange(1000)[::-1]
    for seed in range(20):
        chosen = stratified_subset(lengths, 40, seed=seed, strata=8)
        assert np.bincount(lengths[chosen] // 125, minlength=8).tolist() == [5] * 8


def test_seeds_differ_and_nonsense_is_refused() -> None:
    lengths = list(range(100))
    assert stratified_subset(lengths, 10, seed=1) != stratified_subset(lengths, 10, seed=2)
    with pytest.raises(RequestError):
        stratified_subset(lengths, 0)


def texts(lines: list[str]) -> Dataset:
    return make_dataset("lines", ("text",), lambda: ({"text": line} for line in lines), False)


def varied(count: int, seed: int = 0) -> list[str]:
    """Texts of 1 to 40 made-up words, all different."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return [
        " ".join("".join(rng.choice(letters, rng.integers(3, 9))) for _ in range(rng.integers(1, 41)))
        for _ in range(count)
    ]


def repetitions(distinct: int, copies: int, repeated: int) -> tuple[list[str], list[int], list[int]]:
    """Made-up texts of eight lengths, `distinct` of each; the first `repeated` come `copies` times, but for a letter.

    Gives the texts, what each is a copy of, and the number of its length.
    """
    rng = np.random.default_rng(3)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz     "))
    lines, origins, sizes = [], [], []
    for size in range(8):
        for number in range(distinct):
            text = rng.choice(letters, 60 + 20 * size)
            for copy in range(copies if number < repeated else 1):
                changed = text.copy()
                changed[copy] = "z"
                lines.append("".join(changed))
                origins.append(distinct * size + number)
                sizes.append(size)
    return lines, origins, sizes


def test_near_duplicates_lose_against_distinct_rows() -> None:
    lines, origins, sizes = repetitions(distinct=20, copies=40, repeated=1)
    for seed in range(5):
        planted = {
            name: np.bincount([sizes[i] for i in chosen if origins[i] % 20 == 0], minlength=8)
            for name, chosen in (
                ("content", calibration_subset(texts(lines), 80, seed=seed)),
                ("length", stratified_subset([len(line) for line in lines], 80, seed=seed)),
            )
        }
        assert planted["content"].max() == 1
        assert planted["length"].mean() > 5


def test_none_is_taken_twice_where_all_have_copies() -> None:
    lines, origins, sizes = repetitions(distinct=10, copies=10, repeated=10)
    for seed in range(5):
        chosen = calibration_subset(texts(lines), 64, seed=seed)
        assert len({origins[i] for i in chosen}) == 64
        assert np.bincount([sizes[i] for i in chosen]).tolist() == [8] * 8
        by_length = stratified_subset([len(line) for line in lines], 64, seed=seed)
        assert len({origins[i] for i in by_length}) < 55


def test_a_subset_follows_the_seed_alone() -> None:
    data = texts(varied(300))
    chosen = calibration_subset(data, 50, seed=4)
    assert chosen == calibration_subset(data, 50, seed=4) == sorted(set(chosen))
    assert len(chosen) == 50
    assert chosen != calibration_subset(data, 50, seed=5)
    assert calibration_subset(data, 300) == calibration_subset(data, 999) == list(range(300))
    with pytest.raises(RequestError):
        calibration_subset(data, 0)


def test_lengths_stay_spread() -> None:
    lines = varied(800)
    lengths = np.array([len(line) for line in lines])
    edges = np.quantile(lengths, np.linspace(0, 1, 9))[1:-1]
    chosen = calibration_subset(texts(lines), 80, seed=1)
    shares = np.bincount(np.digitize(lengths[chosen], edges), minlength=8)
    assert np.abs(shares - 10).max() <= 1


def test_rows_without_text_are_drawn_as_before() -> None:
    pictures = default_images(count=20, size=8)
    for seed in range(3):
        assert calibration_subset(pictures, 7, seed=seed) == stratified_subset([0] * 20, 7, seed=seed)


def test_many_rows_are_drawn_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "MOST_BY_CONTENT", 20)
    lines = varied(100)
    chosen = calibration_subset(texts(lines), 21)
    assert chosen == stratified_subset([len(line) for line in lines], 21)
    assert calibration_subset(texts(lines), 20) != stratified_subset([len(line) for line in lines], 20)


def test_the_pool_holds_its_size_and_every_row_has_its_chance() -> None:
    rows = [{"text": f"row {number} " * (number % 3 + 1)} for number in range(40)]
    counts = np.zeros(40)
    for seed in range(400):
        pool = draw_candidates(iter(rows), 10, seed=seed)
        assert pool.vectors is not None
        assert pool.vectors.shape == (10, WIDTH)
        assert len(set(pool.indices.tolist())) == 10
        assert pool.lengths.tolist() == [text_length(rows[i]) for i in pool.indices]
        counts[pool.indices] += 1
    assert np.abs(counts - 100).max() < 45  # five standard deviations
    assert draw_candidates(rows, 64).indices.tolist() == list(range(40))


def test_memory_does_not_grow_with_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "POOL", 128)

    def peak_bytes(count: int) -> int:
        def rows() -> Iterator[dict[str, str]]:
            return ({"text": f"line {number} of the file"} for number in range(count))

        data = Dataset("made up", "", False, ("text",), count, rows)
        tracemalloc.start()
        calibration_subset(data, 16)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    few = peak_bytes(1_000)
    assert few < 4 * 128 * WIDTH * 4
    assert peak_bytes(20_000) < few + 20_000  # bytes: less than one for each row


def test_masking_spares_special_tokens() -> None:
    ids = np.array([101, *range(1000, 1040), 102, 0, 0])
    positions = positions_to_mask(ids, {101, 102, 0}, seed=3)
    assert len(positions) == 6
    assert all(1000 <= ids[p] < 1040 for p in positions)
    np.testing.assert_array_equal(positions, positions_to_mask(ids, {101, 102, 0}, seed=3))
    assert positions.tolist() != positions_to_mask(ids, {101, 102, 0}, seed=4).tolist()
    assert positions_to_mask(np.array([101, 102]), {101, 102}, seed=0).size == 0
    assert positions_to_mask(np.array([101, 7, 102]), {101, 102}, seed=0).tolist() == [1]
