from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from calibration.content import SCALE, WIDTH, content_vector, farthest
from calibration.defaults import default_questions, default_sentences


def vector(text: str) -> np.ndarray:
    found = content_vector({"text": text})
    assert found is not None
    return found


def alike(a: str, b: str) -> float:
    return float(vector(a) @ vector(b)) / SCALE**2


SENTENCE = "The committee approved the budget for the coming year after a long debate."


@pytest.mark.parametrize(
    "other", [SENTENCE.upper(), f"{SENTENCE} Indeed.", SENTENCE.replace("long", "short"), f'"{SENTENCE}"']
)
def test_near_repetitions_are_alike(other: str) -> None:
    assert alike(SENTENCE, other) > 0.85


@pytest.mark.parametrize(
    "other", ["", "Tea, please.", "Cats sleep most of the day and hunt at night.", "委员会批准了预算"]
)
def test_others_are_not(other: str) -> None:
    assert abs(alike(SENTENCE, other)) < 0.3
    assert alike(other, other) == pytest.approx(1, abs=0.05)


def test_what_no_model_reads_does_not_count() -> None:
    row = {"question": "Who came?", "context": "Ann came."}
    truth = {"answers": ["Ann"], "id": "7", "label": "positive", "score": 1.0}
    np.testing.assert_array_equal(content_vector(row), content_vector({**row, **truth}))
    assert not np.array_equal(content_vector(row), content_vector({**row, "context": "Bob came."}))
    np.testing.assert_array_equal(content_vector({"tokens": ["Not", "today."]}), content_vector({"text": "Not today."}))


def test_rows_without_text_have_none() -> None:
    assert content_vector({"image": Path("a.png"), "label": "cat"}) is None
    assert content_vector({"x": np.ones((1, 4), np.float32)}) is None


def test_products_are_exact_in_any_order() -> None:
    """Else another machine's BLAS could choose other rows."""
    rows = [*default_sentences(), *default_questions(), {"text": "a"}, {"text": "aaaa" * 9999}]
    vectors = np.stack([found for row in rows if (found := content_vector(row)) is not None])
    assert vectors.shape == (len(rows), WIDTH)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, np.rint(vectors))
    partial = np.abs(vectors).astype(np.float64) @ np.abs(vectors).astype(np.float64).T
    assert partial.max() < 2**24
    exact = vectors.astype(np.int64) @ vectors.astype(np.int64).T
    np.testing.assert_array_equal(vectors @ vectors.T, exact)


def test_the_farthest_comes_next_and_parts_take_turns() -> None:
    vectors = np.zeros((5, WIDTH), np.float32)
    vectors[0, 0] = vectors[2, 1] = vectors[4, 2] = SCALE
    vectors[1] = vectors[0]
    vectors[3, :2] = SCALE * np.sqrt(0.5)
    assert farthest(vectors, [(np.arange(5), 5)]) == [0, 2, 4, 3, 1]
    # The second part knows what the first took: its row 1 repeats row 0.
    assert farthest(vectors, [(np.array([0, 2]), 1), (np.array([1, 3, 4]), 2)]) == [0, 4, 3]
