"""Training examples: rows of data as token ids and targets, and batches of them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from calibration.datasets import Dataset
from exporter.errors import RequestError
from pipelines.verification.encode import EncodedBatch, encode_rows
from pipelines.verification.metrics import IGNORED_TAG
from pipelines.verification.predict import class_id

Example = dict[str, Any]
COUNTED, TARGET, INDEX, OWN, SECOND = "labels", "target", "index", "teacher_", "second_"
"""Keys of an example beside the model's inputs: what counts for the mean (0) and what does not (-100), what is right
(-100: unknown), the number of the row, inputs of a teacher with a tokenizer of its own, and of a pair's second text."""
_CHUNK = 64


@dataclass(frozen=True)
class Examples:
    """Encoded rows, in the order of the data.

    Attributes:
        items: By key: token ids as lists, targets as numbers or lists.
        lengths: Tokens of each.
        inputs: Names of the model's inputs.
    """

    items: list[Example]
    lengths: list[int]
    inputs: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Example:
        return self.items[number]


def encode_examples(
    task: str,
    encoder: Any,
    rows: Iterable[Mapping[str, Any]],
    *,
    labels: Mapping[int, str] | None = None,
    max_length: int | None = None,
    first: int = 0,
) -> Examples:
    """Rows as training examples.

    Args:
        task: Name of the task.
        encoder: `exporter.preprocess` encoder of the model.
        rows: Data by role; those without a label get none.
        labels: The model's class names by index.
        max_length: Tokens at most; none: as the model has it.
        first: Number of the first row.

    Raises:
        RequestError: The task cannot be trained, or a label is no class of the model.
    """
    if task not in _TARGETS:
        raise RequestError("this task cannot be trained here", task, f"Tasks that can: {', '.join(_TARGETS)}")
    if max_length is not None:
        if not hasattr(encoder, "max_length"):
            raise RequestError("max_length is for texts", max_length, f"Leave it out for {task}")
        encoder = replace(encoder, max_length=min(max_length, encoder.max_length))
    plain = [dict(row) for row in rows]
    items: list[Example] = [{} for _ in _entries(task, plain)]
    for batch in encode_rows(task, encoder, plain, batch_size=_CHUNK):
        for place, index in enumerate(batch.indices):
            item = _one(batch.inputs, place)
            item |= _TARGETS[task](batch, place, labels or {}, len(next(iter(item.values()))))
            items[index] = item | {INDEX: first + index}
    names = tuple(name for name in (items[0] if items else ()) if name not in (COUNTED, TARGET, INDEX))
    return Examples(items, [np.shape(item[names[0]])[0] for item in items], names)


def encode_pairs(
    encoder: Any, rows: Iterable[Mapping[str, Any]], *, largest: float, max_length: int | None = None
) -> Examples:
    """Pairs of texts as training examples of a sentence encoder: its inputs for both, and how alike they are to be.

    Args:
        encoder: As `encode_examples`.
        rows: With ``text``, ``text_pair`` and ``score``.
        largest: Scores are divided by it.
        max_length: Tokens of a text at most; none: as the model has it.
    """
    plain = [dict(row) for row in rows]
    texts = encode_examples("feature-extraction", encoder, plain, max_length=max_length)
    items = [
        first
        | {SECOND + name: second[name] for name in texts.inputs}
        | {TARGET: np.float32(row["score"] / largest), INDEX: number}
        for number, (row, first, second) in enumerate(zip(plain, texts.items[::2], texts.items[1::2], strict=True))
    ]
    lengths = [max(pair) for pair in zip(texts.lengths[::2], texts.lengths[1::2], strict=True)]
    return Examples(items, lengths, texts.inputs)


def only(examples: Examples, kept: Sequence[bool]) -> Examples:
    """Some of them."""
    items = [item for item, keep in zip(examples.items, kept, strict=True) if keep]
    lengths = [length for length, keep in zip(examples.lengths, kept, strict=True) if keep]
    return replace(examples, items=items, lengths=lengths)


def is_labelled(example: Example) -> bool:
    """Whether anything in an example is known to be right."""
    return bool(np.any(np.asarray(example[TARGET]) != IGNORED_TAG))


def join(parts: Sequence[Examples]) -> Examples:
    """Several sets of examples as one."""
    return Examples(
        [item for part in parts for item in part.items],
        [length for part in parts for length in part.lengths],
        parts[0].inputs,
    )


def with_teacher(examples: Examples, theirs: Examples, remedy: str) -> Examples:
    """The examples with the inputs of a teacher that has a tokenizer of its own beside them.

    Raises:
        RequestError: The two cut a text into different numbers of tokens; with the remedy.
    """
    for number, (mine, other) in enumerate(zip(examples.lengths, theirs.lengths, strict=True)):
        if mine != other:
            raise RequestError(
                "teacher and student cut a text into different tokens", f"row {number + 1}: {other} and {mine}", remedy
            )
    items = [
        mine | {OWN + name: other[name] for name in theirs.inputs}
        for mine, other in zip(examples.items, theirs.items, strict=True)
    ]
    return Examples(items, examples.lengths, examples.inputs)


def collator(pad: Mapping[str, int], pad_side: str = "right") -> Callable[[Sequence[Example]], dict[str, Any]]:
    """What makes a batch of examples: `torch` tensors by key, sequences padded to the longest of them.

    Args:
        pad: Value of padding by key; 0 where nothing is said, and -100 for targets.
        pad_side: ``"right"`` or ``"left"``.
    """
    import torch

    values = {COUNTED: IGNORED_TAG, TARGET: IGNORED_TAG, **pad}

    def collate(examples: Sequence[Example]) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        for key in examples[0]:
            arrays = [np.asarray(example[key]) for example in examples]
            if arrays[0].ndim == 1:
                longest = max(len(array) for array in arrays)
                padded = np.full((len(arrays), longest), values.get(key, 0), arrays[0].dtype)
                for row, array in zip(padded, arrays, strict=True):
                    where = slice(0, len(array)) if pad_side == "right" else slice(longest - len(array), longest)
                    row[where] = array
                batch[key] = torch.from_numpy(padded)
            else:
                batch[key] = torch.from_numpy(np.stack(arrays))
        return batch

    return collate


def label_names(data: Dataset, given: Sequence[str]) -> tuple[str, ...]:
    """The class names of a new head: as given, or those of the data, sorted.

    Raises:
        RequestError: The data have numbers instead of names, or a class that is given is not among them, or one of
            theirs is not given.
    """
    found: dict[str, int] = {}
    for number, row in enumerate(data, start=1):
        for label in [row["label"]] if "label" in row else row.get("tags", ()):
            found.setdefault(str(label), number)
    numbers = all(name.lstrip("-").isdecimal() for name in found)
    known = {str(index) for index in range(len(given))} if numbers and given else set(given) or set(found)
    wrong = [name for name in found if name not in known and name.lower() not in {k.lower() for k in known}]
    if wrong:
        remedy = f"Add it to compress.labels, which has {', '.join(given)}, or mend the data"
        raise RequestError("a label of the training data is no class", f"{wrong[0]!r} in row {found[wrong[0]]}", remedy)
    there = {name.lower() for name in found}
    if absent := [
        name
        for name in sorted(known, key=list(given).index if given and not numbers else str)
        if name.lower() not in there
    ]:
        remedy = "Add rows of it, or take it out of compress.labels: a model cannot learn what it never sees"
        raise RequestError("a class is missing from the training data", ", ".join(absent), remedy)
    if len(known) < 2:
        raise RequestError("the training data have one class only", next(iter(known), "none"), "Give at least two")
    if given:
        return tuple(given)
    return tuple(sorted(found, key=int)) if numbers else tuple(sorted(found))


def refuse_missing_classes(data: Dataset, labels: Mapping[int, str]) -> None:
    """Refuse training data without a single row of one of the model's classes.

    Raises:
        RequestError: Names the classes.
    """
    seen = {
        class_id(label, labels) for row in data for label in ([row["label"]] if "label" in row else row.get("tags", ()))
    }
    if absent := [name for index, name in labels.items() if index not in seen]:
        remedy = "Add rows of it: a model forgets a class that it no longer sees"
        raise RequestError("a class is missing from the training data", ", ".join(absent), remedy)


def _entries(task: str, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    pairs = 2 if task == "feature-extraction" else 1
    return [None for row in rows for _ in range(pairs if "text_pair" in row else 1)]


def _one(inputs: Mapping[str, np.ndarray], place: int) -> Example:
    """One row of a batch without its padding."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return {name: array[place] for name, array in inputs.items()}
    kept = np.flatnonzero(mask[place])
    return {name: array[place, kept] for name, array in inputs.items()}


def _class(batch: EncodedBatch, place: int, labels: Mapping[int, str], _: int) -> Example:
    label = batch.rows[place].get("label")
    return {COUNTED: 0, TARGET: IGNORED_TAG if label is None else class_id(label, labels, len(labels) or None)}


def _tags(batch: EncodedBatch, place: int, labels: Mapping[int, str], length: int) -> Example:
    """The class of each word at its first token; other tokens do not count."""
    counted, target = np.full(length, IGNORED_TAG), np.full(length, IGNORED_TAG)
    if batch.word_ids is None:
        raise RequestError("token classification needs the words of the tokens")
    tags = batch.rows[place].get("tags")
    words = batch.word_ids[place][np.flatnonzero(batch.inputs["attention_mask"][place])]
    for position in np.flatnonzero(words >= 0)[::-1]:  # backwards, so that a word's first token has the last say
        same = words == words[position]
        counted[same] = target[same] = IGNORED_TAG
        counted[position] = 0
        if tags is not None:
            target[position] = class_id(tags[words[position]], labels)
    return {COUNTED: counted, TARGET: target}


def _answer(batch: EncodedBatch, place: int, labels: Mapping[int, str], _: int) -> Example:
    """The first and the last token of the first answer; a row whose answer is not within its tokens has none."""
    row, nowhere = batch.rows[place], {COUNTED: 0, TARGET: np.full(2, IGNORED_TAG)}
    span = next(filter(None, (_characters(answer, row["context"]) for answer in row.get("answers", ()))), None)
    if batch.offsets is None or batch.sequence_ids is None:
        raise RequestError("question answering needs the offsets of the tokens")
    if span is None:
        return nowhere
    kept = np.flatnonzero(batch.inputs["attention_mask"][place])
    begins, ends = batch.offsets[place, kept].T
    context = batch.sequence_ids[place, kept] == 1
    inside = np.flatnonzero(context & (begins < span[1]) & (ends > span[0]))
    if not len(inside):
        return nowhere
    first, last, text = inside[0], inside[-1], row["context"]
    if not context[:first].any() and _says_something(text[span[0] : begins[first]]):
        return nowhere  # its beginning was cut off
    if not context[last + 1 :].any() and _says_something(text[ends[last] : span[1]]):
        return nowhere  # or its end
    return {COUNTED: 0, TARGET: np.array([inside[0], inside[-1]])}


def _says_something(text: str) -> bool:
    """Whether there is more in a text than what a tokenizer may leave out without a token: marks, spaces, controls."""
    return any(unicodedata.category(letter) not in ("Mn", "Me", "Cf", "Cc", "Zs") for letter in text)


def _characters(answer: str, context: str) -> tuple[int, int] | None:
    """From which character of the context to which: nearest to where the data say, or else where it is found first,
    among whole words before parts of them.
    """
    text, start = str(answer).strip(), getattr(answer, "start", None)
    places = [found.start() for found in re.finditer(f"(?={re.escape(text)})", context)] if text else []
    if start is None:
        whole = [found.start() for found in re.finditer(rf"(?=(?<!\w){re.escape(text)}(?!\w))", context)]
        places, start = whole or places, 0
    return min(((place, place + len(text)) for place in places), key=lambda span: abs(span[0] - start), default=None)


def _nothing(batch: EncodedBatch, place: int, labels: Mapping[int, str], length: int) -> Example:
    return {COUNTED: 0, TARGET: IGNORED_TAG}


_TARGETS: dict[str, Callable[[EncodedBatch, int, Mapping[int, str], int], Example]] = {
    "text-classification": _class,
    "image-classification": _class,
    "token-classification": _tags,
    "question-answering": _answer,
    "feature-extraction": _nothing,
}
"""Tasks that can be trained, and how a row says what is right."""
