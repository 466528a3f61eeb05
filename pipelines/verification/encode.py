"""From rows of data to batches of model inputs, the same for every model that is compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from calibration.datasets import read_image
from calibration.roles import Row
from calibration.sampling import positions_to_mask
from exporter.errors import RequestError

Array = np.ndarray


@dataclass(frozen=True)
class EncodedBatch:
    """Inputs of some rows, with what leads back from the outputs to them.

    Attributes:
        indices: Which encoded rows these are.
        inputs: By name, batched.
        rows: The data rows.
        offsets: Character offsets of the tokens, int64 (batch, sequence, 2).
        sequence_ids: Which text a token belongs to (-1: neither), int64 (batch, sequence).
        word_ids: Which word a token belongs to (-1: none), int64 (batch, sequence).
        masked: For fill-mask: hidden positions of each row.
        hidden: For fill-mask: the ids that stood there.
    """

    indices: list[int]
    inputs: dict[str, Array]
    rows: list[Row]
    offsets: Array | None = None
    sequence_ids: Array | None = None
    word_ids: Array | None = None
    masked: list[Array] = field(default_factory=list)
    hidden: list[Array] = field(default_factory=list)


def encode_rows(
    task: str, encoder: Any, rows: Iterable[Row], *, batch_size: int = 8, seed: int = 0
) -> list[EncodedBatch]:
    """Encode data in batches of similar length, the same for every model that is compared.

    Args:
        task: Name of the task.
        encoder: `exporter.preprocess` encoder; ``None`` for rows of tensors.
        rows: Data by role (`calibration.datasets.Dataset`).
        batch_size: Rows in a batch.
        seed: Of the tokens that fill-mask hides.

    Raises:
        RequestError: The task cannot be evaluated, or the data do not fit it.
    """
    if task not in _ENCODERS:
        raise RequestError("this task has no predictions", task, f"Known: {', '.join(_ENCODERS)}")
    entries = list(_entries(task, rows))
    order = sorted(range(len(entries)), key=lambda i: _rough_length(entries[i]))
    encode = _ENCODERS[task]
    return [encode(encoder, group, [entries[i] for i in group], seed) for group in _groups(order, entries, batch_size)]


def _entries(task: str, rows: Iterable[Row]) -> Iterator[Row]:
    """Rows as they are encoded: for embeddings, the two texts of a pair one after the other."""
    for row in rows:
        yield row
        if task == "feature-extraction" and "text_pair" in row:
            yield {"text": row["text_pair"]}


def _rough_length(row: Row) -> int:
    sizes = [value.size if isinstance(value, np.ndarray) else len(value) for value in row.values() if _has_size(value)]
    return max(sizes, default=0)


def _has_size(value: Any) -> bool:
    return isinstance(value, str | list | np.ndarray)


def _groups(order: list[int], entries: Sequence[Row], batch_size: int) -> Iterator[list[int]]:
    """Batches; tensors share one only with others of their shapes."""
    group: list[int] = []
    for i in order:
        if group and (len(group) == batch_size or _shapes(entries[i]) != _shapes(entries[group[0]])):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _shapes(row: Row) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in row.items() if isinstance(value, np.ndarray)}


def _encode_texts(encoder: Any, indices: list[int], rows: list[Row], seed: int) -> EncodedBatch:
    pairs = [row["text_pair"] for row in rows] if "text_pair" in rows[0] else None
    return EncodedBatch(indices, encoder.encode([row["text"] for row in rows], pairs), rows)


def _encode_single_texts(encoder: Any, indices: list[int], rows: list[Row], seed: int) -> EncodedBatch:
    return EncodedBatch(indices, encoder.encode([row["text"] for row in rows]), rows)


def _encode_words(encoder: Any, indices: list[int], rows: list[Row], seed: int) -> EncodedBatch:
    encoded = encoder.encode_words([row["tokens"] for row in rows])
    return EncodedBatch(indices, encoded.inputs, rows, word_ids=encoded.word_ids)


def _encode_questions(encoder: Any, indices: list[int], rows: list[Row], seed: int) -> EncodedBatch:
    encoded = encoder.encode_with_offsets([row["question"] for row in rows], [row["context"] for row in rows])
    return EncodedBatch(indices, encoded.inputs, rows, offsets=encoded.offsets, sequence_ids=encoded.sequence_ids)


def _encode_masked(encoder: Any, indices: list[int], rows: list[Row], seed: int) -> EncodedBatch:
    if encoder.mask_id is None:
        raise RequestError("the tokenizer has no mask token", None, "fill-mask needs one in tokenizer_config.json")
    encoded = encoder.encode_with_offsets([row["text"] for row in rows])
    ids = encoded.inputs["input_ids"].copy()
    masked, hidden = [], []
    for row, index in enumerate(indices):
        # Special tokens belong to no text; hiding them would ask for what no text can answer.
        ordinary = np.where(encoded.sequence_ids[row] == 0, ids[row], -1)
        positions = positions_to_mask(ordinary, {-1}, seed=seed + index)
        masked.append(positions)
        hidden.append(ids[row, positions])
        ids[row, positions] = encoder.mask_id
    return EncodedBatch(indices, encoded.inputs | {"input_ids": ids}, rows, masked=masked, hidden=hidden)


def _encode_images(encoder: Any, indices: list[int], rows: list[Row], seed: int) -> EncodedBatch:
    return EncodedBatch(indices, encoder.encode([read_image(row["image"]) for row in rows]), rows)


def _encode_tensors(encoder: Any, indices: list[int], rows: list[Row], seed: int) -> EncodedBatch:
    names = [name for name, value in rows[0].items() if isinstance(value, np.ndarray)]
    return EncodedBatch(indices, {name: np.concatenate([row[name] for row in rows]) for name in names}, rows)


_ENCODERS: dict[str, Callable[[Any, list[int], list[Row], int], EncodedBatch]] = {
    "feature-extraction": _encode_single_texts,
    "text-classification": _encode_texts,
    "token-classification": _encode_words,
    "question-answering": _encode_questions,
    "fill-mask": _encode_masked,
    "image-classification": _encode_images,
    "custom": _encode_tensors,
}
