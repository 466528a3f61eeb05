"""Quality without labels: how far a variant agrees with the original, by task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from exporter.errors import RequestError
from pipelines.verification.gates import worst_verdict
from pipelines.verification.metrics import IGNORED_TAG

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
_AGREEMENTS: dict[tuple[str, str], Agreement] = {}


def register_agreement(*tasks: str, problem: str = "") -> Callable[[Agreement], Agreement]:
    """Decorator: make a function from both models' predictions to measures known for tasks.

    With `problem` it is for models whose configuration has that ``problem_type``.
    """

    def register(function: Agreement) -> Agreement:
        _AGREEMENTS.update(dict.fromkeys(((task, problem) for task in tasks), function))
        return function

    return register


def agreement(task: str, original: Sequence[Any], variant: Sequence[Any], *, problem: str = "") -> list[Measure]:
    """Measures of agreement between the two models' predictions on the same rows (`predict.run_predictions`).

    Args:
        task: Name of the task.
        original: The original's predictions.
        variant: The variant's.
        problem: The ``problem_type`` of the model's configuration, empty where it has none.

    Raises:
        RequestError: The task has none, or the numbers of predictions differ.
    """
    measure = _AGREEMENTS.get((task, problem)) or _AGREEMENTS.get((task, ""))
    if measure is None:
        known = dict.fromkeys(task for task, _ in _AGREEMENTS)
        raise RequestError("this task has no agreement measure", task, f"Known: {', '.join(known)}")
    if len(original) != len(variant) or not len(original):
        raise RequestError("agreement needs predictions for the same rows", f"{len(original)}, {len(variant)}", None)
    return measure(original, variant)


def judge_agreement(measures: Sequence[Measure], samples: int, note: str = "without labels") -> dict[str, Any]:
    """The verdict record of quality without labels, as the report has it; `note` says why none were used."""
    verdict = worst_verdict(measure.verdict for measure in measures)
    shown = [m for m in measures if m.verdict == verdict and (m.threshold is not None or m.value is None)] or measures
    reason = ", ".join(_describe(measure) for measure in shown)
    return {
        "verdict": verdict,
        "reason": f"agreement with the original on {samples} rows {note}: {reason}",
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
    everything = len(original)
    # All pairs of many rows are too many: rows spread evenly over the data stand for them.
    chosen = np.linspace(0, everything - 1, min(everything, _MOST_EMBEDDINGS)).round().astype(int)
    first, second = (_unit_rows(np.stack([side[i] for i in chosen])) for side in (original, variant))
    rows = len(first)
    of = f" ({rows} of {everything} texts)" if rows < everything else ""
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
        _judged(f"Spearman of pairwise cosines{of}", correlation, 0.99),
        _informing(f"overlap of the {neighbours} nearest neighbours{of}", float(np.mean(shared))),
    ]


@register_agreement("text-classification", "image-classification")
def class_agreement(original: Sequence[Array], variant: Sequence[Array]) -> list[Measure]:
    """Share of rows with the same class (>= 0.98), and the mean Kullback-Leibler divergence from the original.

    A lone logit is a score, as those of rerankers are: all of them may lie on one side of zero.
    """
    a, b = np.stack(original), np.stack(variant)
    if a.shape != b.shape:
        return [Measure("same number of classes", 0.0, 1.0, "failed")]
    if a.shape[1] == 1:
        return score_agreement(original, variant)
    # argmax takes the first NaN for the largest of all: two broken models would agree.
    same = (a.argmax(axis=1) == b.argmax(axis=1)) & np.isfinite(b).all(axis=1)
    p, q = _log_softmax(a), _log_softmax(b)
    divergence = float(np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0).mean())
    return [_judged("label agreement", float(same.mean()), 0.98), _informing("mean KL divergence (nats)", divergence)]


@register_agreement("text-classification", "image-classification", problem="multi_label_classification")
def label_set_agreement(original: Sequence[Array], variant: Sequence[Array]) -> list[Measure]:
    """Share of rows with the same labels, each chosen where its sigmoid is above one half (>= 0.98)."""
    a, b = np.stack(original), np.stack(variant)
    if a.shape != b.shape:
        return [Measure("same number of labels", 0.0, 1.0, "failed")]
    same = ((a > 0) == (b > 0)) & np.isfinite(b)
    return [
        _judged("rows with the same labels", float(same.all(axis=1).mean()), 0.98),
        _informing("same choice, label by label", float(same.mean())),
    ]


@register_agreement("text-classification", "image-classification", problem="regression")
def score_agreement(original: Sequence[Array], variant: Sequence[Array]) -> list[Measure]:
    """Spearman between the two models' scores (>= 0.99, of several scores the worst), and their RMS difference."""
    a, b = np.stack(original), np.stack(variant)
    if a.shape != b.shape:
        return [Measure("same number of scores", 0.0, 1.0, "failed")]
    if len(a) < 3:
        return [Measure("Spearman of scores (needs 3 rows)", None, 0.99, "inconclusive")]
    found = [_spearman(one, other) for one, other in zip(a.T, b.T, strict=True)]
    spread = float(np.sqrt(((a - a.mean(axis=0)) ** 2).mean()))
    error = float(np.sqrt(((a - b) ** 2).mean()))
    return [
        # `min` may pass a NaN over, which NumPy's does not.
        _judged("Spearman of scores", float(np.min(found)), 0.99),
        _informing("RMS difference over the spread of scores", error / spread if spread else float("nan")),
    ]


@register_agreement("question-answering")
def span_agreement(original: Sequence[Any], variant: Sequence[Any]) -> list[Measure]:
    """Share of questions answered with the very same span (>= 0.97)."""
    same = [a[:2] == b[:2] for a, b in zip(original, variant, strict=True)]
    return [_judged("span agreement", float(np.mean(same)), 0.97)]


@register_agreement("fill-mask", "token-classification")
def position_agreement(original: Sequence[Array], variant: Sequence[Array]) -> list[Measure]:
    """Share of positions (masked tokens; words) with the same choice (>= 0.98), over all rows together.

    Words beyond the model's limit were seen by neither model, and do not count.
    """
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(original, variant, strict=True)]
    same = sum(int(((a == b) & (a != IGNORED_TAG)).sum()) for a, b in pairs)
    everything = sum(len(a) for a, _ in pairs)
    positions = sum(int((a != IGNORED_TAG).sum()) for a, _ in pairs)
    name = "agreement per position"
    if positions < everything:
        name += f" ({everything - positions} of {everything} not seen: beyond the model's limit)"
    if not positions:
        return [Measure(f"{name} (no positions)", None, 0.98, "inconclusive")]
    return [_judged(name, same / positions, 0.98)]


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


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


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
