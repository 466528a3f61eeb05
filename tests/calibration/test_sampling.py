from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.sampling import positions_to_mask, stratified_subset
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


def test_masking_spares_special_tokens() -> None:
    ids = np.array([101, *range(1000, 1040), 102, 0, 0])
    positions = positions_to_mask(ids, {101, 102, 0}, seed=3)
    assert len(positions) == 6
    assert all(1000 <= ids[p] < 1040 for p in positions)
    np.testing.assert_array_equal(positions, positions_to_mask(ids, {101, 102, 0}, seed=3))
    assert positions.tolist() != positions_to_mask(ids, {101, 102, 0}, seed=4).tolist()
    assert positions_to_mask(np.array([101, 102]), {101, 102}, seed=0).size == 0
    assert positions_to_mask(np.array([101, 7, 102]), {101, 102}, seed=0).tolist() == [1]
