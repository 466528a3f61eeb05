from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from exporter.errors import RequestError
from pipelines.verification.metrics import best_f1, check_metric, get_metric, metrics, normalize_answer, register_metric

PAIRS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=40)


def resample(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Drawn rows, and the weights that say the same."""
    drawn = rng.integers(0, rows, rows)
    return drawn, np.bincount(drawn, minlength=rows).astype(float)[None]


def random_rows(name: str, rng: np.random.Generator, rows: int) -> tuple[list, list]:
    """Predictions and truths of a metric's kind, right about half of the time."""
    if name in ("pearson", "spearman"):
        truths = np.round(rng.uniform(0, 5, rows), 1)
        return list(np.round(truths + rng.normal(0, 2, rows), 1)), list(truths)
    if name in ("accuracy", "top-1", "macro-f1"):
        return list(rng.integers(0, 3, rows)), list(rng.integers(0, 3, rows))
    if name in ("token-accuracy", "token-f1", "masked-token-accuracy"):
        lengths = rng.integers(1, 6, rows)
        truths = [rng.integers(0, 3, n) for n in lengths]
        for row in truths[::4]:
            row[0] = -100
        return [rng.integers(0, 3, n) for n in lengths], truths
    words = ["the cat", "a dog", "cat sat", "mat", ""]
    truths = [[words[i] for i in rng.integers(0, 5, rng.integers(0, 3))] for _ in range(rows)]
    return [words[i] for i in rng.integers(0, 5, rows)], truths


@pytest.mark.parametrize("name", metrics())
def test_weights_mean_what_drawing_rows_means(name: str) -> None:
    """The value under weights is the value of the sample in which every row occurs so often."""
    rng = np.random.default_rng(5)
    metric = get_metric(name)
    predictions, truths = random_rows(name, rng, 40)
    weighted = metric.over(predictions, truths)
    draws = [resample(rng, 40) for _ in range(25)]
    values = weighted(np.concatenate([weights for _, weights in draws]))
    for (drawn, _), value in zip(draws, values, strict=True):
        expected = metric.value([predictions[i] for i in drawn], [truths[i] for i in drawn])
        assert value == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert len(set(values.round(6))) > 5


@settings(max_examples=100, deadline=None)
@given(PAIRS)
def test_correlations_equal_scipys(pairs: list[tuple[int, int]]) -> None:
    x, y = (np.array(side, dtype=float) for side in zip(*pairs, strict=True))
    for name, reference in (("spearman", stats.spearmanr), ("pearson", stats.pearsonr)):
        value = get_metric(name).value(list(x), list(y))
        if len(set(x)) == 1 or len(set(y)) == 1:
            assert np.isnan(value)
        else:
            assert value == pytest.approx(reference(x, y).statistic, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(PAIRS)
def test_macro_f1_equals_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    got, wanted = (list(side) for side in zip(*pairs, strict=True))
    expected = sklearn_metrics.f1_score(wanted, got, average="macro", zero_division=0)
    assert get_metric("macro-f1").value(got, wanted) == pytest.approx(expected)
    assert get_metric("accuracy").value(got, wanted) == pytest.approx(np.mean(np.equal(got, wanted)))


def test_token_metrics_by_hand() -> None:
    truths = [np.array([0, 1, 2, -100]), np.array([0, 0])]
    predictions = [np.array([0, 1, 1, 9]), np.array([1, 0])]
    assert get_metric("token-accuracy").value(predictions, truths) == pytest.approx(3 / 5)
    # Tags other than 0: two true ones, three predicted ones, one right.
    assert get_metric("token-f1").value(predictions, truths) == pytest.approx(2 * 1 / (2 + 3))
    assert np.isnan(get_metric("token-f1").value([np.array([0])], [np.array([0])]))
    with pytest.raises(RequestError, match="differ in number"):
        get_metric("token-accuracy").value([np.array([0, 1])], [np.array([0])])


def test_squad_normalization_and_f1_by_hand() -> None:
    assert normalize_answer("  The   Cat's, a  HAT! ") == "cats hat"
    assert best_f1("the black cat", ["black cat", "dog"]) == 1.0
    assert best_f1("black cat sat", ["cat", "a fat black cat"]) == pytest.approx(2 * 2 / (3 + 3))
    assert best_f1("cat cat", ["cat"]) == pytest.approx(2 * 1 / (2 + 1))
    assert best_f1("", []) == 1.0
    assert best_f1("cat", []) == 0.0
    assert best_f1("", ["cat"]) == 0.0
    predictions, truths = ["The Cat!", "dog", ""], [["a cat"], ["cat", "a dog."], []]
    assert get_metric("exact-match").value(predictions, truths) == 1.0
    assert get_metric("span-f1").value(["cat sat", "no"], [["cat"], ["yes"]]) == pytest.approx((2 / 3) / 2)


def test_unknown_metrics_and_rows_that_do_not_match() -> None:
    with pytest.raises(RequestError, match=r"unknown metric.*spearman"):
        get_metric("bleu")
    with pytest.raises(RequestError, match="2 for 1"):
        get_metric("accuracy").value([1, 2], [1])
    with pytest.raises(RequestError, match="0 for 0"):
        get_metric("accuracy").value([], [])


def test_a_metric_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.verification.metrics._METRICS", {})

    @register_metric("always", "always half")
    def always(predictions: list, truths: list):
        return lambda weights: np.full(len(weights), 0.5)

    assert get_metric("always").value([1], [1]) == 0.5


def test_a_metric_has_to_fit_task_and_classes() -> None:
    tags = {0: "B-PER", 1: "O"}
    for task in ("text-classification", "image-classification"):
        check_metric("macro-f1", task, {})
    check_metric("token-f1", "token-classification", tags)
    with pytest.raises(RequestError, match=r"does not fit.*exact-match.*accuracy, top-1, macro-f1"):
        check_metric("exact-match", "text-classification", {})
    with pytest.raises(RequestError, match="has no metric"):
        check_metric("accuracy", "custom", {})
    with pytest.raises(RequestError, match=r"named O.*LABEL_0"):
        check_metric("token-f1", "token-classification", {0: "LABEL_0"})
    with pytest.raises(RequestError, match=r"named O.*names no classes"):
        check_metric("token-f1", "token-classification", {})
    with pytest.raises(RequestError, match=r"unknown metric.*acuracy.*accuracy"):
        check_metric("acuracy", "text-classification", {})
