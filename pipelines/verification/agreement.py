"""Quality without labels: how far a variant agrees with the original, by task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from exporter.errors import RequestError
from pipelines.verification.gates import worst_verdict

Array = np.ndarray
_MOST_EMBEDDINGS = 2000  # 2 million pairs
_NEIGHBOURS = 10


@dataclass(frozen=True)
class Measure:
    """One measure of agreement.

    Attributes:
        name: As the report shows it.
        value: The measure; ``None`` where there are too few rows for it.
        threshold: What `value` has to reach; ``None`` where it informs only.
        verdict: ``passed``, ``failed`` or, without a value, ``inconclusive``.
    """

    name: str
    value: float | None
    threshold: float | None
    verdict: str


Agreement = Callable[[Sequence[Any], Sequence[Any]], list[Measure]]
_AGREEMENTS: dict[str, Agreement] = {}


def register_agreement(*tasks: str) -> Callable[[Agreement], Agreement]:
    """Decorator: make a function from both models' predictions to measures known for tasks."""

    def register(function: Agreement) -> Agreement:
        _AGREEMENTS.update(dict.fromkeys(tasks, function))
        return function

    return register


def agreement(task: str, original: Sequence[Any], variant: Sequence[Any]) -> list[Measure]:
    """Measures of agreement between the two models' predictions on the same rows (`predict.run_predictions`).

    Raises:
        RequestError: The task has none, or the numbers of predictions differ.
    """
    if task not in _AGREEMENTS:
        raise RequestError("this task has no agreement measure", task, f"Known: {', '.join(_AGREEMENTS)}")
    if len(original) != len(variant) or not len(original):
        raise RequestError("agreement needs predictions for the same rows", f"{len(original)}, {len(variant)}", None)
    return _AGREEMENTS[task](original, variant)


def judge_agreement(measures: Sequence[Measure], samples: int) -> dict[str, Any]:
    """The verdict record of quality without labels, as the report has it."""
    verdict = worst_verdict(measure.verdict for measure in measures)
    shown = [m for m in measures if m.verdict == verdict and (m.threshold is not None or m.value is None)] or measures
    reason = ", ".join(_describe(measure) for measure in shown)
    return {
        "verdict": verdict,
        "reason": f"agreement with the original on {samples} rows without labels: {reason}",
        "metric": None,
        "original": None,
        "variant": None,
        "difference": None,
        "low": None,
        "high": None,
        "max_drop": None,
        "max_drop_worst": None,
        "samples": samples,
        "more_samples_needed": None,
        "measures": [asdict(measure) for measure in measures],
    }


@register_agreement("feature-extraction")
def embedding_agreement(original: Sequence[Array], variant: Sequence[Array]) -> list[Measure]:
    """Spearman between the two models' pairwise cosines (>= 0.99), and the overlap of each row's nearest neighbours."""
    first, second = (_unit_rows(np.stack(side[:_MOST_EMBEDDINGS])) for side in (original, variant))
    rows = len(first)
    if first.shape != second.shape:
        return [Measure("same shape of embeddings", 0.0, 1.0, "failed")]
    if rows < 3:
        return [Measure("Spearman of pairwise cosines (needs 3 rows)", None, 0.99, "inconclusive")]
    cosines = [side @ side.T for side in (first, second)]
    upper = np.triu_indices(rows, k=1)
    correlation = _spearman(cosines[0][upper], cosines[1][upper])
    neighbours = min(_NEIGHBOURS, rows - 2)
    sets = []
    for matrix in cosines:
        np.fill_diagonal(matrix, -np.inf)
        sets.append(np.argpartition(-matrix, neighbours, axis=1)[:, :neighbours])
    shared = [len(np.intersect1d(a, b)) / neighbours for a, b in zip(*sets, strict=True)]
    return [
        _judged("Spearman of pairwise cosines", correlation, 0.99),
        _informing(f"overlap of the {neighbours} nearest neighbours", float(np.mean(shared))),
    ]


@register_agreement("text-classification", "image-classification")
def class_agreement(original: Sequence[Array], variant: Sequence[Array]) -> list[Measure]:
    """Share of rows with the same class (>= 0.98), and the mean Kullback-Leibler divergence from the original."""
    p, q = np.stack(original), np.stack(variant)
    if p.shape != q.shape:
        return [Measure("same number of classes", 0.0, 1.0, "failed")]
    same = float((p.argmax(axis=1) == q.argmax(axis=1)).mean())
    smallest = np.finfo(np.float64).tiny
    logs = np.log(np.maximum(p, smallest)) - np.log(np.maximum(q, smallest))
    divergence = float(np.maximum((p * logs).sum(axis=1), 0).mean())
    return [_judged("label agreement", same, 0.98), _informing("mean KL divergence (nats)", divergence)]


@register_agreement("question-answering")
def span_agreement(original: Sequence[Any], variant: Sequence[Any]) -> list[Measure]:
    """Share of questions answered with the very same span (>= 0.97)."""
    same = [a[:2] == b[:2] for a, b in zip(original, variant, strict=True)]
    return [_judged("span agreement", float(np.mean(same)), 0.97)]


@register_agreement("fill-mask", "token-classification")
def position_agreement(original: Sequence[Array], variant: Sequence[Array]) -> list[Measure]:
    """Share of positions (masked tokens; words) with the same choice (>= 0.98), over all rows together."""
    same = sum(int((np.asarray(a) == np.asarray(b)).sum()) for a, b in zip(original, variant, strict=True))
    positions = sum(len(row) for row in original)
    if not positions:
        return [Measure("agreement per position (no positions)", None, 0.98, "inconclusive")]
    return [_judged("agreement per position", same / positions, 0.98)]


@register_agreement("custom")
def vector_agreement(original: Sequence[Array], variant: Sequence[Array]) -> list[Measure]:
    """Mean and smallest cosine between the two models' outputs of a row; the mean has to reach 0.99."""
    cosines = np.array([_cosine(a, b) for a, b in zip(original, variant, strict=True)])
    return [
        _judged("mean cosine of outputs", float(cosines.mean()), 0.99),
        _informing("smallest cosine of outputs", float(cosines.min())),
    ]


def _judged(name: str, value: float, threshold: float) -> Measure:
    # A NaN is smaller than nothing: comparing this way round makes it fail.
    return Measure(name, _finite(value), threshold, "passed" if value >= threshold else "failed")


def _informing(name: str, value: float) -> Measure:
    return Measure(name, _finite(value), None, "passed")


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _describe(measure: Measure) -> str:
    value = "undefined" if measure.value is None else f"{measure.value:.4f}"
    return f"{measure.name} {value}" + ("" if measure.threshold is None else f" (at least {measure.threshold:g})")


def _unit_rows(matrix: Array) -> Array:
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    return matrix / np.where(norms > 0, norms, 1.0)


def _cosine(a: Array, b: Array) -> float:
    if a.shape != b.shape:
        return -1.0
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms else float(np.array_equal(a, b))


def _spearman(a: Array, b: Array) -> float:
    from scipy.stats import spearmanr

    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("nan")
    if np.array_equal(a, b):
        return 1.0  # also where all are equal, for which the correlation is undefined
    return float(spearmanr(a, b).statistic)
