"""Formats of data files: each reader turns a path into a `Table`, whose rows are read anew, and lazily, on every pass.

A reader reports what is wrong with a file by line (text formats) or row (binary ones); it knows nothing of tasks.
"""

from __future__ import annotations

import csv
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import RequestError, missing_package


@dataclass(frozen=True)
class Table:
    """A data file, opened.

    Attributes:
        columns: Names in the file's order; ``"0"``, ``"1"`` … where columns are known by position only.
        rows: Starts a new pass; yields where the row stands (``"line 7"``) and its values by column.
    """

    columns: tuple[str, ...]
    rows: Callable[[], Iterator[tuple[str, dict[str, Any]]]]


Reader = Callable[[Path, bool], Table]
_READERS: dict[str, Reader] = {}


def register_format(*suffixes: str) -> Callable[[Reader], Reader]:
    """Decorator: make a reader known for file name endings (with the dot); ``"/"`` stands for a folder.

    A reader takes the path and whether columns are given by position (then a text table has no header line).
    """

    def register(reader: Reader) -> Reader:
        _READERS.update(dict.fromkeys(suffixes, reader))
        return reader

    return register


def formats() -> list[str]:
    """The file name endings that can be read."""
    return sorted(suffix for suffix in _READERS if suffix != "/")


def open_table(path: Path, *, by_position: bool) -> Table:
    """Open a data file or a `datasets` folder.

    Raises:
        RequestError: It does not exist, its format is unknown, or it is broken.
    """
    if not path.exists():
        raise RequestError("the data file does not exist", path, "Check the path")
    suffix = "/" if path.is_dir() else path.suffix.lower()
    if suffix not in _READERS:
        known = f"Known: {', '.join(formats())}, and folders written by datasets.save_to_disk"
        raise RequestError("the format of the data file is not known", path, known)
    return _READERS[suffix](path, by_position)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, decoded one by one so that a broken byte can be placed."""
    with path.open("rb") as handle:
        for number, raw in enumerate(handle, 1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise RequestError(
                    "the data file is not UTF-8",
                    f"{path}, line {number}: byte 0x{raw[error.start]:02x}",
                    "Save it as UTF-8, for example with iconv",
                ) from error
            if "\x00" in text:
                raise RequestError(
                    "the data file holds a null character",
                    f"{path}, line {number}",
                    "It is probably UTF-16 or binary; save it as UTF-8 text",
                )
            yield number, text


def _need_names(path: Path, by_position: bool) -> None:
    if by_position:
        raise RequestError("columns by number need a CSV or TSV file", path, "Give the columns of this file by name")


@register_format(".csv", ".tsv")
def _read_delimited(path: Path, by_position: bool) -> Table:
    """CSV with quotes as in RFC 4180; TSV as linguistic corpora have it: a tab always separates, quotes are text."""
    tabs = path.suffix.lower() == ".tsv"

    def records() -> Iterator[tuple[str, list[str]]]:
        reader = csv.reader(
            (text for _, text in _lines(path)),
            delimiter="\t" if tabs else ",",
            quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
            strict=True,
        )
        width = 0
        line = 1
        try:
            for fields in reader:
                if fields:
                    width = width or len(fields)
                    if len(fields) != width:
                        raise RequestError(
                            f"a row has {len(fields)} fields where the first has {width}",
                            f"{path}, line {line}",
                            "Quote fields that hold the separator, or mend the row",
                        )
                    yield f"line {line}", fields
                line = reader.line_num + 1
        except csv.Error as error:
            raise RequestError(f"the data file is broken ({error})", f"{path}, line {line}", "Mend the row") from error

    first = next(records(), None)
    if first is None:
        raise RequestError("the data file has no rows", path, "Give a file with at least one row")
    columns = tuple(str(i) for i in range(len(first[1]))) if by_position else tuple(name.strip() for name in first[1])

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        stream = records()
        if not by_position:
            next(stream)
        for place, fields in stream:
            yield place, dict(zip(columns, fields, strict=True))

    return Table(columns, rows)


@register_format(".txt")
def _read_text(path: Path, by_position: bool) -> Table:
    """One text a line; blank lines are skipped."""
    column = "0" if by_position else "text"

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        for number, text in _lines(path):
            if text.strip():
                yield f"line {number}", {column: text.strip()}

    return Table((column,), rows)


@register_format(".jsonl", ".ndjson")
def _read_jsonl(path: Path, by_position: bool) -> Table:
    _need_names(path, by_position)

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        for number, text in _lines(path):
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                raise RequestError(f"a line is not JSON ({error.msg})", f"{path}, line {number}", "Mend it") from error
            if not isinstance(value, dict):
                raise RequestError("a line is not a JSON object", f"{path}, line {number}", 'Write {"text": …}')
            yield f"line {number}", value

    first = next(rows(), None)
    return Table(tuple(first[1]) if first else (), rows)


@register_format(".json")
def _read_json(path: Path, by_position: bool) -> Table:
    """A list of objects, or SQuAD's form, flattened to one row per question."""
    _need_names(path, by_position)
    text = "".join(line for _, line in _lines(path))
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise RequestError(
            f"the data file is not JSON ({error.msg})", f"{path}, line {error.lineno}", "Mend it"
        ) from error
    if isinstance(document, dict) and isinstance(document.get("data"), list):
        entries = _flatten_squad(path, document["data"])
    elif isinstance(document, list) and all(isinstance(entry, dict) for entry in document):
        entries = document
    else:
        raise RequestError("the JSON is neither a list of objects nor of SQuAD's form", path, "Use JSONL for tables")
    columns = tuple(entries[0]) if entries else ()
    return Table(columns, lambda: ((f"row {i}", entry) for i, entry in enumerate(entries, 1)))


def _flatten_squad(path: Path, articles: list[Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    answers = [
                        {"text": answer["text"], "answer_start": answer.get("answer_start")}
                        for answer in question.get("answers", [])
                    ]
                    rows.append(
                        {
                            "question": question["question"],
                            "context": paragraph["context"],
                            "answers": answers,
                            "id": str(question.get("id", len(rows))),
                        }
                    )
    except (KeyError, TypeError, AttributeError) as error:
        raise RequestError(
            f"the file is not of SQuAD's form (near question {len(rows) + 1}: {error!r})",
            path,
            "It needs data[].paragraphs[].{context, qas[].{question, answers[].text}}",
        ) from error
    return rows


@register_format(".parquet")
def _read_parquet(path: Path, by_position: bool) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    _need_names(path, by_position)
    try:
        columns = tuple(pq.read_schema(path).names)
    except (pa.ArrowException, OSError) as error:
        raise RequestError(f"the Parquet file cannot be read ({error})", path, "Write it again") from error

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        number = 0
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=1024):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"row {number}", row
        except (pa.ArrowException, OSError) as error:
            raise RequestError(
                f"the Parquet file is broken ({error})", f"{path}, after row {number}", "Write it again"
            ) from error

    return Table(columns, rows)


@register_format(".npz")
def _read_npz(path: Path, by_position: bool) -> Table:
    """Arrays of one length; row `i` holds ``array[i:i+1]`` of each, so that a row is a batch of one."""
    _need_names(path, by_position)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise RequestError(f"the .npz file cannot be read ({error})", path, "Write it with numpy.savez") from error
    if flat := [name for name, array in arrays.items() if array.ndim == 0]:
        raise RequestError("an array has no rows", f"{path}: {', '.join(flat)}", "Its first dimension must be the rows")
    if len({len(array) for array in arrays.values()}) > 1:
        sizes = ", ".join(f"{name}: {len(array)}" for name, array in arrays.items())
        raise RequestError("the arrays differ in their number of rows", f"{path} ({sizes})", "Make them one length")
    count = len(next(iter(arrays.values()))) if arrays else 0

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        for i in range(count):
            yield f"row {i + 1}", {name: array[i : i + 1] for name, array in arrays.items()}

    return Table(tuple(arrays), rows)


@register_format("/")
def _read_datasets_folder(path: Path, by_position: bool) -> Table:
    """A folder written by `datasets.Dataset.save_to_disk`; of several splits one has to be named."""
    _need_names(path, by_position)
    splits = path / "dataset_dict.json"
    if not splits.exists() and not (path / "state.json").exists():
        raise RequestError(
            "the folder is not one written by datasets.save_to_disk", path, f"Or give a file: {', '.join(formats())}"
        )
    try:
        import datasets
    except ImportError as error:
        raise missing_package("datasets", "examples") from error
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(f"the datasets folder cannot be read ({error})", path, "Write it again") from error
    if isinstance(loaded, datasets.DatasetDict):
        if len(loaded) != 1:
            raise RequestError(
                "the datasets folder holds several splits", path, f"Name one: {path}/<{'|'.join(loaded)}>"
            )
        loaded = next(iter(loaded.values()))
    for name, feature in loaded.features.items():
        if isinstance(feature, datasets.Image):
            loaded = loaded.cast_column(name, datasets.Image(decode=False))
    return Table(tuple(loaded.column_names), lambda: ((f"row {i}", dict(row)) for i, row in enumerate(loaded, 1)))
