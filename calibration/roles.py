"""What a task reads from a data set: the roles of its columns, and how a value becomes what its role promises."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import RequestError

Row = dict[str, Any]


@dataclass(frozen=True)
class Roles:
    """What a task reads from a data set.

    Attributes:
        required: Roles without which nothing can run.
        optional: Further inputs of the model.
        truth: Roles that all have to be there for the data to count as labelled.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    truth: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.required, *self.optional, *self.truth)))


# Further inputs that a task's model takes where the data has them.
_OPTIONAL: dict[str, tuple[str, ...]] = {"text-classification": ("text_pair",), "question-answering": ("id",)}


def task_roles(task: str, inputs: Sequence[str] = ()) -> Roles:
    """The roles of a task's data.

    Args:
        task: Name of a registered task.
        inputs: The model's input names, which are the roles where the task declares none (``custom``).

    Raises:
        RequestError: The task is not known.
    """
    from exporter.tasks import get_task

    known = get_task(task)
    return Roles(known.roles or tuple(inputs), _OPTIONAL.get(known.name, ()), known.label_roles)


# Names that a column commonly has for a role, looked for (in this order, whatever the case) when none is given.
USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "text": ("text", "sentence", "sentence1", "text_a", "content"),
    "text_pair": ("text_pair", "sentence2", "text_b"),
    "score": ("score", "similarity", "gold"),
    "label": ("label", "labels", "class", "category"),
    "tokens": ("tokens", "words"),
    "tags": ("tags", "ner_tags", "pos_tags"),
    "answers": ("answers", "answer"),
    "image": ("image", "image_path", "path", "file", "file_name"),
}
TRUTH = frozenset({"score", "label", "tags", "answers"})
"""Roles that hold what a metric compares predictions with."""


def convert_row(path: Path, place: str, values: Mapping[str, Any], chosen: Mapping[str, str]) -> Row:
    """One row of a file by role.

    Args:
        path: The file, which image paths are relative to.
        place: Where the row stands in it, for errors.
        values: By column.
        chosen: From role to column.

    Raises:
        RequestError: A value that its role does not allow.
    """
    row: Row = {}
    for role, column in chosen.items():
        value = values.get(column)
        try:
            row[role] = _CONVERTERS.get(role, _tensor)(value, path)
        except (ValueError, TypeError) as error:
            shown = f"{path}, {place}, column {column!r}: {str(value)[:80]!r}"
            raise RequestError(f"a value cannot be a {role} ({error})", shown, "Mend or drop the row") from error
    if "tags" in row and "tokens" in row and len(row["tags"]) != len(row["tokens"]):
        counts = f"{len(row['tokens'])} tokens, {len(row['tags'])} tags"
        raise RequestError("tokens and tags differ in number", f"{path}, {place}: {counts}", "Mend or drop the row")
    return row


def _text(value: Any, _: Path) -> str:
    if not isinstance(value, str):
        raise TypeError("not text")
    return value


def _score(value: Any, _: Path) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number


def _label(value: Any, _: Path) -> int | str:
    if isinstance(value, str):
        stripped = value.strip()
        if not stripped:
            raise ValueError("empty")
        return int(stripped) if stripped.removeprefix("-").isdecimal() else stripped
    if isinstance(value, bool | int | np.integer):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise TypeError("neither a whole number nor a name")


def _tokens(value: Any, _: Path) -> list[str]:
    tokens = value.split() if isinstance(value, str) else list(value)
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise ValueError("not a list of words" if tokens else "empty")
    return tokens


def _tags(value: Any, path: Path) -> list[int | str]:
    return [_label(tag, path) for tag in (value.split() if isinstance(value, str) else value)]


class Answer(str):
    """The text of an answer; in `start` the character of the context that it begins at, where the data say so."""

    start: int | None

    def __new__(cls, text: str, start: int | None = None) -> Answer:
        self = super().__new__(cls, text)
        self.start = start
        return self

    def __getnewargs__(self) -> tuple[str, int | None]:  # type: ignore[override]
        return str(self), self.start


def _answers(value: Any, _: Path) -> list[Answer]:
    if isinstance(value, Mapping) and not isinstance(value.get("text"), str):  # as `datasets` gives SQuAD, by columns
        texts, starts = value.get("text"), value.get("answer_start")
        if texts is None:
            raise TypeError("without text")
        starts = [None] * len(texts) if starts is None else starts
        if len(starts) != len(texts):
            raise ValueError(f"{len(texts)} texts and {len(starts)} starts")
        value = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    if value is None:
        raise TypeError("missing; a question without an answer has []")
    return [_answer(one) for one in ([value] if isinstance(value, str | Mapping) else value)]


def _answer(value: Any) -> Answer:
    text, start = (value.get("text"), value.get("answer_start")) if isinstance(value, Mapping) else (value, None)
    if not isinstance(text, str):
        raise TypeError("not text")
    return Answer(text, None if start is None else int(start))


def _image(value: Any, path: Path) -> Path | bytes:
    if isinstance(value, Mapping):  # Parquet files and `datasets` folders hold {"bytes", "path"}
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise TypeError("neither a path nor an encoded picture")
    image = ((path if path.is_dir() else path.parent) / value).resolve()
    if not image.is_file():
        raise ValueError(f"there is no file {image}")
    return image


def _tensor(value: Any, _: Path) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise TypeError("not numbers of one shape")
    return array[None]


_CONVERTERS: dict[str, Callable[[Any, Path], Any]] = {
    **dict.fromkeys(("text", "text_pair", "question", "context"), _text),
    "id": lambda value, _: str(value),
    "score": _score,
    "label": _label,
    "tokens": _tokens,
    "tags": _tags,
    "answers": _answers,
    "image": _image,
}
