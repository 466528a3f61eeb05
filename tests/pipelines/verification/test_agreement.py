from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import spearmanr

from exporter.errors import RequestError
from pipelines.verification.agreement import agreement, judge_agreement
from pipelines.verification.predict import Span


def embeddings(rows: int = 60, noise: float = 0.0, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    # Some structure, so that there are near and far neighbours.
    base = rng.standard_normal((6, 16))[rng.integers(0, 6, rows)] + 0.5 * rng.standard_normal((rows, 16))
    return list(base + noise * np.random.default_rng(1).standard_normal(base.shape))


def test_embeddings_equal_a_brute_force_computation() -> None:
    original, variant = embeddings(), embeddings(noise=0.3)
    correlation, overlap = agreement("feature-extraction", original, variant)

    def cosines(side: list[np.ndarray]) -> np.ndarray:
        return np.array([[a @ b / np.sqrt((a @ a) * (b @ b)) for b in side] for a in side])

    first, second = cosines(original), cosines(variant)
    pairs = [(i, j) for i in range(60) for j in range(i)]
    expected = spearmanr([first[p] for p in pairs], [second[p] for p in pairs])[0]
    assert correlation.value == pytest.approx(expected)
    shared = []
    for i in range(60):
        near = [set(sorted((j for j in range(60) if j != i), key=lambda j: -m[i, j])[:10]) for m in (first, second)]
        shared.append(len(near[0] & near[1]) / 10)
    assert overlap.value == pytest.approx(np.mean(shared))
    assert (overlap.threshold, overlap.verdict) == (None, "passed")


@pytest.mark.parametrize(("noise", "verdict"), [(0.0, "passed"), (0.01, "passed"), (0.5, "failed")])
def test_embeddings_are_judged_by_the_correlation(noise: float, verdict: str) -> None:
    measures = agreement("feature-extraction", embeddings(), embeddings(noise=noise))
    record = judge_agreement(measures, 60)
    assert record["verdict"] == verdict
    assert "0.99" in record["reason"]
    assert record["measures"][0]["threshold"] == 0.99
    json.dumps(record, allow_nan=False)


def test_rotated_embeddings_agree_and_swapped_rows_do_not() -> None:
    original = embeddings()
    rotation = np.linalg.qr(np.random.default_rng(3).standard_normal((16, 16)))[0]
    rotated = [row @ rotation * 3 for row in original]
    assert agreement("feature-extraction", original, rotated)[0].value == pytest.approx(1.0)
    swapped = original[1:] + original[:1]
    assert agreement("feature-extraction", original, swapped)[0].verdict == "failed"


def test_embeddings_with_nan_or_too_few_rows() -> None:
    original, variant = embeddings(), embeddings()
    variant[3] = variant[3] * np.nan
    (measure, _) = agreement("feature-extraction", original, variant)
    assert (measure.value, measure.verdict) == (None, "failed")
    json.dumps(judge_agreement([measure], 60), allow_nan=False)
    few = agreement("feature-extraction", original[:2], original[:2])
    assert judge_agreement(few, 2)["verdict"] == "inconclusive"


def test_classes_by_hand() -> None:
    p = [np.array([0.9, 0.1]), np.array([0.4, 0.6])]
    q = [np.array([0.8, 0.2]), np.array([0.6, 0.4])]
    logits = [[np.log(row) + shift for row in side] for side, shift in ((p, 3.0), (q, -2.0))]
    labels, divergence = agreement("text-classification", *logits)
    assert (labels.value, labels.verdict) == (0.5, "failed")
    expected = np.mean([sum(a * np.log(a / b) for a, b in zip(*row, strict=True)) for row in zip(p, q, strict=True)])
    assert divergence.value == pytest.approx(expected)
    assert agreement("image-classification", p, p)[1].value == 0.0
    sure = [np.array([1000.0, 0.0])]
    assert agreement("text-classification", sure, [np.array([0.0, 1000.0])])[1].value == pytest.approx(1000)
    broken = [np.array([np.nan, np.nan])] * 2
    assert agreement("text-classification", broken, broken)[0].verdict == "failed"


def test_scores_have_no_classes_to_agree_on() -> None:
    """Half of a regression's scores turned over: one logit has one class, so labels would agree on every row."""
    original = [np.array([value]) for value in np.random.default_rng(0).normal(2, 0.3, 50)]
    turned = [row if i % 2 else 4 - row for i, row in enumerate(original)]
    near = [row + 1e-4 for row in original]
    for problem in ("", "regression"):
        assert agreement("text-classification", original, turned, problem=problem)[0].verdict == "failed"
        order, error = agreement("text-classification", original, near, problem=problem)
        assert order.verdict == "passed"
        assert error.value == pytest.approx(1e-4 / np.std(original))
    two = [np.array([row[0], 1.0 + i]) for i, row in enumerate(original)]
    second = [row * [1, -1] for row in two]
    assert agreement("text-classification", two, second, problem="regression")[0].value == pytest.approx(-1)
    broken = [row * np.nan for row in two]
    assert agreement("text-classification", two, broken, problem="regression")[0].verdict == "failed"
    few = agreement("text-classification", original[:2], original[:2])
    assert few[0].verdict == "inconclusive"


def test_several_labels_are_chosen_each_by_itself() -> None:
    original = [np.array([3.0, 2.0, -1.0])] * 50
    lost = [np.array([3.0, -2.0, -1.0])] * 50  # the likeliest class is the same
    assert agreement("text-classification", original, lost)[0].verdict == "passed"
    rows, each = agreement("text-classification", original, lost, problem="multi_label_classification")
    assert (rows.value, rows.verdict) == (0.0, "failed")
    assert each.value == pytest.approx(2 / 3)
    same = agreement("text-classification", original, original, problem="multi_label_classification")
    assert same[0].verdict == "passed"


def test_words_that_no_model_saw_do_not_agree() -> None:
    original = [np.array([1, 2, *[-100] * 98])]
    variant = [np.array([1, 9, *[-100] * 98])]
    (measure,) = agreement("token-classification", original, variant)
    assert (measure.value, measure.verdict) == (0.5, "failed")
    assert "98 of 100 not seen" in judge_agreement([measure], 1)["reason"]
    assert agreement("token-classification", [original[0][2:]], [variant[0][2:]])[0].verdict == "inconclusive"


def test_of_many_embeddings_rows_from_everywhere_are_compared() -> None:
    original = embeddings(rows=3000)
    spoiled = [*original[:2000], *embeddings(rows=1000, seed=7)]
    measure = agreement("feature-extraction", original, spoiled)[0]
    assert measure.verdict == "failed"
    assert "2000 of 3000 texts" in measure.name


@pytest.mark.parametrize(
    ("task", "threshold", "right", "wrong"),
    [
        ("text-classification", 0.98, np.array([0.9, 0.1]), np.array([0.1, 0.9])),
        ("question-answering", 0.97, Span(0, 3, "cat"), Span(0, 4, "cats")),
    ],
)
def test_thresholds_of_rows(task: str, threshold: float, right: object, wrong: object) -> None:
    rows = 100
    for flips in range(5):
        variant = [wrong] * flips + [right] * (rows - flips)
        measure = agreement(task, [right] * rows, variant)[0]
        assert measure.value == pytest.approx(1 - flips / rows)
        assert measure.verdict == ("passed" if 1 - flips / rows >= threshold else "failed")


def test_positions() -> None:
    original = [np.array([1, 2, 3]), np.array([4])]
    assert agreement("fill-mask", original, [np.array([1, 2, 9]), np.array([4])])[0].value == 0.75
    assert agreement("token-classification", original, original)[0].verdict == "passed"
    assert agreement("fill-mask", [np.array([])], [np.array([])])[0].verdict == "inconclusive"


def test_custom_outputs() -> None:
    original = [np.array([1.0, 0.0]), np.array([0.0, 0.0])]
    mean, smallest = agreement("custom", original, original)
    assert (mean.value, smallest.value) == (1.0, 1.0)
    mean, smallest = agreement("custom", original, [np.array([0.0, 1.0]), np.array([0.0, 0.0])])
    assert (mean.value, mean.verdict, smallest.value) == (0.5, "failed", 0.0)
    assert agreement("custom", original, [np.zeros(3), np.zeros(2)])[0].verdict == "failed"


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(RequestError, match="no agreement measure"):
        agreement("speech", [1], [1])
    with pytest.raises(RequestError, match="same rows"):
        agreement("custom", [np.zeros(1)], [])
