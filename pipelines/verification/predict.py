"""From model outputs to what metrics and agreement measures compare.

One prediction per encoded row, by task:

- feature-extraction: the embedding, float64 (dim,). A row with a ``text_pair`` is two encoded rows.
- text-classification, image-classification: logits, float64 (classes,).
- token-classification: one class id per word, int64 (words,); -100 for a word that was cut off.
- question-answering: `Span`, the answer's place in the context and its text.
- fill-mask: the likeliest token at each hidden position, int64 (positions,).
- custom: all outputs of the row, flattened, float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from calibration.roles import Row
from exporter.errors import RequestError
from pipelines.verification.encode import EncodedBatch
from pipelines.verification.metrics import IGNORED_TAG, OUTSIDE

Array = np.ndarray
_LONGEST_ANSWER_TOKENS = 30
WITHOUT_METRIC = ("regression", "multi_label_classification")
"""Values of ``problem_type`` whose labels are no single class: the metrics of classes mean nothing there."""


class Span(NamedTuple):
    """An answer: characters `start` to `end` of the context, and the text there."""

    start: int
    end: int
    text: str


def run_predictions(
    task: str, batches: Sequence[EncodedBatch], run: Callable[[dict[str, Array]], Mapping[str, Array]]
) -> list[Any]:
    """One prediction per encoded row, in the data's order.

    Args:
        task: Name of the task.
        batches: From `encode_rows`.
        run: The model: inputs to outputs, by name.
    """
    found: dict[int, Any] = {}
    for batch in batches:
        outputs = run(batch.inputs)
        found.update(zip(batch.indices, predict(task, batch, outputs), strict=True))
    return [found[i] for i in range(len(found))]


# From outputs to predictions -----------------------------------------------------------------------------------------

Predictor = Callable[[EncodedBatch, Mapping[str, Array]], list[Any]]
_PREDICTORS: dict[str, Predictor] = {}


def register_predictor(*tasks: str) -> Callable[[Predictor], Predictor]:
    """Decorator: make a function from a batch and the outputs to one prediction per row known for tasks."""

    def register(predictor: Predictor) -> Predictor:
        _PREDICTORS.update(dict.fromkeys(tasks, predictor))
        return predictor

    return register


def predict(task: str, batch: EncodedBatch, outputs: Mapping[str, Array]) -> list[Any]:
    """One prediction per row of the batch (see the top of this file for what that is)."""
    return _PREDICTORS[task](batch, outputs)


@register_predictor("feature-extraction")
def _embeddings(batch: EncodedBatch, outputs: Mapping[str, Array]) -> list[Any]:
    """The model's own sentence embedding; without one, the mean over the tokens attended to."""
    if "sentence_embedding" in outputs:
        return list(outputs["sentence_embedding"].astype(np.float64))
    hidden = next(iter(outputs.values())).astype(np.float64)
    if hidden.ndim != 3:
        return list(hidden.reshape(len(hidden), -1))
    weights = batch.inputs.get("attention_mask", np.ones(hidden.shape[:2]))[..., None].astype(np.float64)
    return list((hidden * weights).sum(axis=1) / np.maximum(weights.sum(axis=1), 1.0))


@register_predictor("text-classification", "image-classification")
def _logits(batch: EncodedBatch, outputs: Mapping[str, Array]) -> list[Any]:
    return list(outputs["logits"].astype(np.float64))


@register_predictor("token-classification")
def _word_tags(batch: EncodedBatch, outputs: Mapping[str, Array]) -> list[Any]:
    """The class of each word's first token; a word that was cut off has none, and so counts for no model."""
    classes = outputs["logits"].argmax(axis=-1)
    if batch.word_ids is None:
        raise RequestError("token classification needs the words of the tokens", None, "Encode the rows as words")
    tagged = []
    for row, words, found in zip(batch.rows, batch.word_ids, classes, strict=True):
        tags = np.full(len(row["tokens"]), IGNORED_TAG, np.int64)
        for position in np.flatnonzero(words >= 0)[::-1]:  # backwards, so that a word's first token has the last say
            tags[words[position]] = found[position]
        tagged.append(tags)
    return tagged


@register_predictor("question-answering")
def _spans(batch: EncodedBatch, outputs: Mapping[str, Array]) -> list[Any]:
    """The span of the context with the largest sum of start and end logit, at most 30 tokens long."""
    if batch.offsets is None or batch.sequence_ids is None:
        raise RequestError("question answering needs the offsets of the tokens", None, "Encode the rows with offsets")
    found = []
    for i, row in enumerate(batch.rows):
        places = np.flatnonzero(batch.sequence_ids[i] == 1)
        if not places.size:
            found.append(Span(0, 0, ""))
            continue
        start = outputs["start_logits"][i, places].astype(np.float64)
        end = outputs["end_logits"][i, places].astype(np.float64)
        scores = start[:, None] + end[None, :]
        length = np.arange(len(places))[None, :] - np.arange(len(places))[:, None]
        scores[(length < 0) | (length >= _LONGEST_ANSWER_TOKENS)] = -np.inf
        first, last = np.unravel_index(int(np.nan_to_num(scores, nan=-np.inf).argmax()), scores.shape)
        left, right = int(batch.offsets[i, places[first], 0]), int(batch.offsets[i, places[last], 1])
        found.append(Span(left, right, row["context"][left:right]))
    return found


@register_predictor("fill-mask")
def _hidden_tokens(batch: EncodedBatch, outputs: Mapping[str, Array]) -> list[Any]:
    return [outputs["logits"][i, positions].argmax(axis=-1) for i, positions in enumerate(batch.masked)]


@register_predictor("custom")
def _vectors(batch: EncodedBatch, outputs: Mapping[str, Array]) -> list[Any]:
    """All outputs that have a row per sample, one after the other."""
    count = len(batch.rows)
    parts = [value.reshape(count, -1).astype(np.float64) for value in outputs.values() if len(value) == count]
    return list(np.concatenate(parts, axis=1)) if parts else [np.zeros(0)] * count


# From predictions to the arguments of a metric -----------------------------------------------------------------------


def metric_arguments(
    task: str,
    predictions: Sequence[Any],
    rows: Sequence[Row],
    *,
    batches: Sequence[EncodedBatch] = (),
    labels: Mapping[int, str] | None = None,
) -> tuple[list[Any], list[Any]]:
    """Predictions and truths as the task's metrics take them, one of each per labelled row.

    Args:
        task: Name of the task.
        predictions: From `run_predictions`.
        rows: The labelled data.
        batches: From `encode_rows`; fill-mask reads the hidden tokens there.
        labels: The model's class names by index, for data that names classes.

    Raises:
        RequestError: A label that the model does not know, or a task that has no metric.
    """
    if task not in _ARGUMENTS:
        raise RequestError(
            "this task has no metric on labelled data", task, f"Tasks that have: {', '.join(_ARGUMENTS)}"
        )
    return _ARGUMENTS[task](predictions, rows, batches, labels or {})


def class_id(label: int | str, labels: Mapping[int, str], classes: int | None = None) -> int:
    """A label as the model's class index: a number as it is, a name by the model's names (whatever the case).

    Raises:
        RequestError: The model has no such class.
    """
    if isinstance(label, str):
        by_name = {name.lower(): index for index, name in labels.items()}
        if label.lower() not in by_name:
            raise RequestError("the model has no class of that name", label, f"It has: {', '.join(labels.values())}")
        return by_name[label.lower()]
    if classes is not None and not 0 <= label < classes:
        raise RequestError("the model has no class of that number", label, f"It has classes 0 to {classes - 1}")
    return int(label)


Rows = Sequence[Row]


def _pair_cosines(predictions: Sequence[Any], rows: Rows, _b: Any, _l: Any) -> tuple[list[Any], list[Any]]:
    first, second = np.stack(predictions[0::2]), np.stack(predictions[1::2])
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    cosines = (first * second).sum(axis=1) / np.where(norms > 0, norms, 1.0)
    return list(cosines), [row["score"] for row in rows]


def _classes(predictions: Sequence[Any], rows: Rows, _b: Any, labels: Mapping[int, str]) -> tuple[list[Any], list[Any]]:
    """A single logit is the second of two classes."""
    lone = len(predictions[0]) == 1
    wanted = [class_id(row["label"], labels, 2 if lone else len(predictions[0])) for row in rows]
    return [int(p[0] > 0) if lone else int(np.argmax(p)) for p in predictions], wanted


def _tags(predictions: Sequence[Any], rows: Rows, _b: Any, labels: Mapping[int, str]) -> tuple[list[Any], list[Any]]:
    """Numbered so that 0 is "outside", as metrics have it; words that no model saw do not count."""
    wanted = [np.array([class_id(tag, labels) for tag in row["tags"]]) for row in rows]
    outside = next((index for index, name in labels.items() if name.upper() == OUTSIDE), 0)
    seen = [np.where(got == IGNORED_TAG, IGNORED_TAG, tags) for got, tags in zip(predictions, wanted, strict=True)]
    return [_swapped(got, outside) for got in predictions], [_swapped(tags, outside) for tags in seen]


def _swapped(tags: Array, outside: int) -> Array:
    """`tags` with the numbers 0 and `outside` exchanged."""
    return np.where(tags == outside, 0, np.where(tags == 0, outside, tags))


def _answers(predictions: Sequence[Any], rows: Rows, _b: Any, _l: Any) -> tuple[list[Any], list[Any]]:
    return [span.text for span in predictions], [row["answers"] for row in rows]


def _hidden(
    predictions: Sequence[Any], _r: Rows, batches: Sequence[EncodedBatch], _l: Any
) -> tuple[list[Any], list[Any]]:
    hidden = {i: ids for batch in batches for i, ids in zip(batch.indices, batch.hidden, strict=True)}
    return list(predictions), [hidden[i] for i in range(len(predictions))]


_ARGUMENTS: dict[str, Callable[..., tuple[list[Any], list[Any]]]] = {
    "feature-extraction": _pair_cosines,
    "text-classification": _classes,
    "image-classification": _classes,
    "token-classification": _tags,
    "question-answering": _answers,
    "fill-mask": _hidden,
}
