"""Task metrics on labelled data.

Every metric can be computed under many weightings of the rows at once, which is what a bootstrap needs: a resample of
the rows is a weighting by how often each was drawn.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from exporter.errors import RequestError

Array = np.ndarray
Weighted = Callable[[Array], Array]
"""From weights, shape (resamples, rows), to one value per resample; NaN where the metric is undefined there."""
IGNORED_TAG = -100
"""The tag of a token that does not count, as PyTorch's losses have it."""
OUTSIDE = "O"
"""What the usual schemes call the tag of a word that carries none."""


@dataclass(frozen=True)
class Metric:
    """A metric whose values lie between -1 or 0 and 1, the higher the better.

    Attributes:
        name: As recipes and tasks have it.
        label: For people.
        over: From one prediction and one truth per row to the metric under weights of the rows.
        tasks: Tasks whose predictions it takes; empty: any.
        needs_label: A class name without which it means nothing.
        hits: For a share of rows that are right: which of them are, bool (rows,).
    """

    name: str
    label: str
    over: Callable[[Sequence[Any], Sequence[Any]], Weighted]
    tasks: tuple[str, ...] = ()
    needs_label: str | None = None
    hits: Callable[[Sequence[Any], Sequence[Any]], Array] | None = None

    def value(self, predictions: Sequence[Any], truths: Sequence[Any]) -> float:
        """The metric over all rows."""
        return float(self.over(predictions, truths)(np.ones((1, len(truths))))[0])


_METRICS: dict[str, Metric] = {}


def register_metric(
    name: str,
    label: str,
    *,
    tasks: Sequence[str] = (),
    needs_label: str | None = None,
    hits: Callable[[Sequence[Any], Sequence[Any]], Array] | None = None,
) -> Callable[[Callable[..., Weighted]], Callable[..., Weighted]]:
    """Decorator: make a function from (predictions, truths) to `Weighted` known as a metric (see `Metric`)."""

    def register(over: Callable[..., Weighted]) -> Callable[..., Weighted]:
        def checked(predictions: Sequence[Any], truths: Sequence[Any]) -> Weighted:
            if len(predictions) != len(truths) or not len(truths):
                raise RequestError(
                    "a metric needs one prediction per labelled row", f"{len(predictions)} for {len(truths)}", None
                )
            return over(predictions, truths)

        _METRICS[name] = Metric(name, label, checked, tuple(tasks), needs_label, hits)
        return over

    return register


def metrics() -> dict[str, Metric]:
    """All registered metrics by name."""
    return dict(_METRICS)


def get_metric(name: str) -> Metric:
    """The metric of that name.

    Raises:
        RequestError: There is none; lists the choices.
    """
    if name not in _METRICS:
        raise RequestError("unknown metric", name, f"Known metrics: {', '.join(_METRICS)}")
    return _METRICS[name]


def check_metric(name: str, task: str, labels: Mapping[int, str]) -> None:
    """See that a metric means something for a task and a model's classes.

    Raises:
        RequestError: There is no such metric, or it is one of other predictions, or the model lacks the class that it
            is about.
    """
    metric = get_metric(name)
    if metric.tasks and task not in metric.tasks:
        fitting = [other.name for other in _METRICS.values() if task in other.tasks]
        raise RequestError(
            f"the metric does not fit the task {task}",
            name,
            f"Metrics of this task: {', '.join(fitting)}" if fitting else "This task has no metric: leave it out",
        )
    if metric.needs_label and metric.needs_label not in {label.upper() for label in labels.values()}:
        named = f"Its classes: {', '.join(labels.values())}" if labels else "Its config.json names no classes"
        raise RequestError(
            f"the metric needs a class named {metric.needs_label}, which the model does not have",
            name,
            f"{named}. Use token-accuracy, or name the class in id2label",
        )


def _right_classes(predictions: Sequence[int], truths: Sequence[int]) -> Array:
    return np.asarray(predictions) == np.asarray(truths)


def _right_answers(predictions: Sequence[str], truths: Sequence[Sequence[str]]) -> Array:
    rows = zip(predictions, truths, strict=True)
    return np.array([normalize_answer(got) in {normalize_answer(w) for w in wanted or [""]} for got, wanted in rows])


_CLASSES = ("text-classification", "image-classification")


# Correlations: one number predicted, one true, per row ---------------------------------------------------------------


@register_metric("pearson", "Pearson correlation", tasks=("feature-extraction",))
def pearson(predictions: Sequence[float], truths: Sequence[float]) -> Weighted:
    """Pearson's correlation."""
    x, y = _numbers(predictions), _numbers(truths)
    x, y = x - x.mean(), y - y.mean()
    sums = np.stack([x, y, x * x, y * y, x * y], axis=1)

    def weighted(weights: Array) -> Array:
        total = weights.sum(axis=1)
        mx, my, xx, yy, xy = (weights @ sums / total[:, None]).T
        return _ratio(xy - mx * my, np.sqrt(np.maximum(xx - mx * mx, 0) * np.maximum(yy - my * my, 0)))

    return weighted


@register_metric("spearman", "Spearman correlation", tasks=("feature-extraction",))
def spearman(predictions: Sequence[float], truths: Sequence[float]) -> Weighted:
    """Spearman's rank correlation, ties at their mean rank. A row of weight w counts as w equal rows."""
    x, y = _numbers(predictions), _numbers(truths)
    rank_x, rank_y = _weighted_ranks(x), _weighted_ranks(y)

    def weighted(weights: Array) -> Array:
        centre = (weights.sum(axis=1, keepdims=True) + 1) / 2
        x, y = rank_x(weights) - centre, rank_y(weights) - centre
        xx, yy = np.einsum("ij,ij,ij->i", weights, x, x), np.einsum("ij,ij,ij->i", weights, y, y)
        return _ratio(np.einsum("ij,ij,ij->i", weights, x, y), np.sqrt(xx * yy))

    return weighted


def _weighted_ranks(values: Array) -> Weighted:
    """Mean ranks of the rows, shape as the weights: the ranks in the sample that the weights describe."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    sizes = np.diff(np.r_[starts, len(values)])
    back = np.empty_like(order)
    back[order] = np.repeat(np.arange(len(starts)), sizes)

    def ranks(weights: Array) -> Array:
        groups = np.add.reduceat(weights[:, order], starts, axis=1)
        return (np.cumsum(groups, axis=1) - groups / 2 + 0.5)[:, back]

    return ranks


# Shares and F1: sums of what each row contributes --------------------------------------------------------------------


@register_metric("accuracy", "accuracy", tasks=_CLASSES, hits=_right_classes)
def accuracy(predictions: Sequence[int], truths: Sequence[int]) -> Weighted:
    """Share of rows whose class is right."""
    return _mean(_right_classes(predictions, truths))


@register_metric("top-1", "top-1 accuracy", tasks=_CLASSES, hits=_right_classes)
def top_1(predictions: Sequence[int], truths: Sequence[int]) -> Weighted:
    """Accuracy, under the name that it has for images."""
    return accuracy(predictions, truths)


@register_metric("macro-f1", "macro F1", tasks=_CLASSES)
def macro_f1(predictions: Sequence[int], truths: Sequence[int]) -> Weighted:
    """Mean over the classes that are predicted or true of ``2 tp / (2 tp + fp + fn)``."""
    got, wanted = np.asarray(predictions), np.asarray(truths)
    classes = np.union1d(got, wanted)
    is_got, is_wanted = got[:, None] == classes, wanted[:, None] == classes
    hits = (is_got & is_wanted).astype(np.float64)
    marks = is_got.astype(np.float64) + is_wanted  # 2 tp + fp + fn

    def weighted(weights: Array) -> Array:
        found, total = weights @ hits, weights @ marks
        present = total > 0
        f1 = np.divide(2 * found, total, out=np.zeros_like(found), where=present)
        return _ratio(f1.sum(axis=1), present.sum(axis=1))

    return weighted


@register_metric("token-accuracy", "token accuracy", tasks=("token-classification",))
def token_accuracy(predictions: Sequence[Array], truths: Sequence[Array]) -> Weighted:
    """Share of tokens whose tag is right, over all tokens; those with the true tag -100 do not count."""
    rows = [_counted(got, wanted) for got, wanted in zip(predictions, truths, strict=True)]
    return _share([(got == wanted).sum() for got, wanted in rows], [len(wanted) for _, wanted in rows])


@register_metric("token-f1", "token F1", tasks=("token-classification",), needs_label=OUTSIDE)
def token_f1(predictions: Sequence[Array], truths: Sequence[Array]) -> Weighted:
    """Micro-averaged F1 over tokens that carry a tag: tag 0 is "outside" (`predict.metric_arguments` sees to that)."""
    hits, marks = [], []
    for got, wanted in (_counted(*row) for row in zip(predictions, truths, strict=True)):
        hits.append(2 * ((got == wanted) & (wanted != 0)).sum())
        marks.append((got != 0).sum() + (wanted != 0).sum())
    return _share(hits, marks)


@register_metric("masked-token-accuracy", "accuracy at masked tokens", tasks=("fill-mask",))
def masked_token_accuracy(predictions: Sequence[Array], truths: Sequence[Array]) -> Weighted:
    """Share of hidden tokens that are named right, over all hidden tokens."""
    return token_accuracy(predictions, truths)


@register_metric("span-f1", "span F1", tasks=("question-answering",))
def span_f1(predictions: Sequence[str], truths: Sequence[Sequence[str]]) -> Weighted:
    """SQuAD's F1: words shared by the predicted and the best fitting true answer, mean over rows."""
    return _mean([best_f1(got, wanted) for got, wanted in zip(predictions, truths, strict=True)])


@register_metric("exact-match", "exact match", tasks=("question-answering",), hits=_right_answers)
def exact_match(predictions: Sequence[str], truths: Sequence[Sequence[str]]) -> Weighted:
    """SQuAD's EM: share of rows whose answer is one of the true ones, after normalization."""
    return _mean(_right_answers(predictions, truths))


def normalize_answer(text: str) -> str:
    """Lower case without punctuation, articles and superfluous spaces (P. Rajpurkar et al., SQuAD, 2016)."""
    kept = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", kept).split())


def best_f1(answer: str, truths: Sequence[str]) -> float:
    """The best F1 of the answer's words with those of a true answer; no true answer: 1 for an empty one."""
    return max(_word_f1(normalize_answer(answer).split(), normalize_answer(truth).split()) for truth in truths or [""])


_PUNCTUATION = frozenset(string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def _word_f1(got: list[str], wanted: list[str]) -> float:
    if not got or not wanted:
        return float(got == wanted)
    shared = sum((Counter(got) & Counter(wanted)).values())
    return 2 * shared / (len(got) + len(wanted))


def _numbers(values: Sequence[float]) -> Array:
    return np.asarray(values, dtype=np.float64)


def _counted(got: Any, wanted: Any) -> tuple[Array, Array]:
    got, wanted = np.asarray(got), np.asarray(wanted)
    if got.shape != wanted.shape:
        raise RequestError("predictions and tags differ in number", f"{got.shape} and {wanted.shape}", None)
    counts = wanted != IGNORED_TAG
    return got[counts], wanted[counts]


def _mean(values: Any) -> Weighted:
    numbers = np.asarray(values, dtype=np.float64)
    return lambda weights: weights @ numbers / weights.sum(axis=1)


def _share(parts: Sequence[Any], totals: Sequence[Any]) -> Weighted:
    part, total = _numbers(parts), _numbers(totals)
    return lambda weights: _ratio(weights @ part, weights @ total)


def _ratio(above: Array, below: Array) -> Array:
    below = np.asarray(below, dtype=np.float64)
    return np.divide(above, below, out=np.full_like(below, np.nan), where=below > 0)
