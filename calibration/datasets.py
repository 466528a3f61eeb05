"""Data sets for calibration and evaluation: rows by role (text, label, image …), read lazily, checked before use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from calibration.readers import Table, open_table
from calibration.roles import TRUTH, USUAL_NAMES, Answer, Row, convert_row, task_roles
from exporter.errors import RequestError


@dataclass(frozen=True)
class Dataset:
    """Rows as dictionaries from role to value; every iteration reads them anew, so that a large file is never held.

    Values: ``text``, ``text_pair``, ``question``, ``context``, ``id``: `str`. ``score``: `float`. ``label``: `int` or
    `str` (a class name). ``tokens``: list of `str`. ``tags``: list of `int` or `str`, one per token. ``answers``: list
    of `Answer`. ``image``: absolute `Path`, encoded `bytes`, or a uint8 array (height, width, 3); `read_image` opens
    all three. Any other role: an array of shape (1, …), a batch of one.

    Attributes:
        origin: Where the rows come from, for the report: a file's name, never its folder.
        digest: SHA-256 of the rows' content (of the pictures themselves, not of their paths).
        labelled: The rows carry what a task metric compares with.
        roles: The roles that every row has.
        size: Number of rows.
    """

    origin: str
    digest: str
    labelled: bool
    roles: tuple[str, ...]
    size: int
    source: Callable[[], Iterable[Row]] = field(repr=False, compare=False)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.source())

    def __len__(self) -> int:
        return self.size


def make_dataset(origin: str, roles: Sequence[str], rows: Callable[[], Iterable[Row]], labelled: bool) -> Dataset:
    """A data set over rows that are ready; reads them once to count and digest them."""
    digest = hashlib.sha256()
    size = 0
    for row in rows():
        for role in sorted(row):
            _digest_value(digest, role, row[role])
        size += 1
    return Dataset(origin, digest.hexdigest(), labelled, tuple(roles), size, rows)


def load_dataset(
    path: Path | str,
    *,
    columns: Mapping[str, str | int] | None = None,
    roles: Sequence[str],
    optional: Sequence[str] = (),
    limit: int | None = None,
    seed: int = 0,
    split: str | None = None,
) -> Dataset:
    """Open a data file, check every row and give the rows by role.

    Args:
        path: CSV, TSV, text (a line a row), JSONL, JSON (also of SQuAD's form), Parquet, ``.npz``, or a folder written
            by `datasets.save_to_disk`.
        columns: From role to column: a name, or (CSV and TSV, which then have no header line) a position from 0, as a
            number or its digits. Without it, columns are found by the role's usual names.
        roles: Roles that must be there.
        optional: Roles that are taken when the file has them.
        limit: At most so many rows, drawn evenly at random by `seed`, in the file's order.
        seed: Of that draw.
        split: The split to take where the `datasets` folder holds several.

    Raises:
        RequestError: Missing columns (it names those that exist), no rows, broken encoding or ragged rows (it names the
            line), a value that its role does not allow, an unknown format.
    """
    path = _one_split(Path(path), split)
    columns = dict(columns or {})
    if limit is not None and limit < 1:
        raise RequestError("the limit of rows must be at least 1", limit, "Leave it out to use all rows")
    table = open_table(path, by_position=_by_position(columns))
    chosen = _resolve(path, table, columns, roles, optional)

    def convert() -> Iterator[Row]:
        for place, values in table.rows():
            yield convert_row(path, place, values, chosen)

    count = sum(1 for _ in convert())
    if count == 0:
        raise RequestError("the data file has no rows", path, "Give a file with at least one row")
    rows = _drawn(convert, count, limit, seed)
    return make_dataset(path.name, tuple(chosen), rows, bool(TRUTH & set(chosen)))


def limited(data: Dataset, limit: int | None, *, seed: int = 0) -> Dataset:
    """At most `limit` rows of a data set, drawn evenly at random by `seed`, in their order."""
    if limit is None or limit >= len(data):
        return data
    return make_dataset(data.origin, data.roles, _drawn(data.source, len(data), limit, seed), data.labelled)


def _drawn(rows: Callable[[], Iterable[Row]], count: int, limit: int | None, seed: int) -> Callable[[], Iterable[Row]]:
    if limit is None or limit >= count:
        return rows
    kept = set(np.random.default_rng(seed).choice(count, size=limit, replace=False).tolist())
    return lambda: islice((row for i, row in enumerate(rows()) if i in kept), len(kept))


def load_task_dataset(
    task: str,
    path: Path | str,
    *,
    columns: Mapping[str, str | int] | None = None,
    limit: int | None = None,
    seed: int = 0,
    split: str | None = None,
    inputs: Sequence[str] = (),
) -> Dataset:
    """`load_dataset` with the roles of a task; truth counts only when it is whole (a score needs its second text).

    Args:
        inputs: The model's input names, which are the roles of the task ``custom``.
    """
    known = task_roles(task, inputs)
    if stray := [role for role in columns or () if role not in known.all]:
        raise RequestError(
            f"the task {task} has no such role for a column", ", ".join(stray), f"Its roles: {', '.join(known.all)}"
        )
    extra = (*known.optional, *known.truth)
    data = load_dataset(
        path, columns=columns, roles=known.required, optional=extra, limit=limit, seed=seed, split=split
    )
    labelled = bool(known.truth) and set(known.truth) <= set(data.roles)
    return Dataset(data.origin, data.digest, labelled, data.roles, data.size, data.source)


def read_image(value: Path | bytes | np.ndarray) -> Any:
    """Open an ``image`` value as a `PIL.Image` in RGB, turned upright where the file says how it was held (EXIF).

    Raises:
        RequestError: The file is not a picture that Pillow can read.
    """
    import io

    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(value, np.ndarray):
        return Image.fromarray(value).convert("RGB")
    try:
        with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        shown = f"{len(value)} bytes" if isinstance(value, bytes) else value
        raise RequestError(f"the picture cannot be read ({error})", shown, "Use PNG, JPEG or WebP") from error


def _one_split(path: Path, split: str | None) -> Path:
    if split is None:
        return path
    listing = path / "dataset_dict.json"
    if not listing.is_file():
        raise RequestError("only a datasets folder with splits takes a split", f"{split} of {path}", "Leave it out")
    try:
        splits = json.loads(listing.read_text(encoding="utf-8"))["splits"]
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError("the list of splits cannot be read", listing, "Write the folder again") from error
    if split not in splits:
        raise RequestError("the datasets folder has no such split", split, f"Its splits: {', '.join(splits)}")
    return path / split


def _by_position(columns: Mapping[str, str | int]) -> bool:
    kinds = {isinstance(column, int) or column.isdecimal() for column in columns.values()}
    if len(kinds) > 1:
        raise RequestError(
            "columns are given partly by name and partly by number", dict(columns), "Use one way for all of them"
        )
    return kinds == {True}


def _resolve(
    path: Path, table: Table, columns: Mapping[str, str | int], roles: Sequence[str], optional: Sequence[str]
) -> dict[str, str]:
    """From role to the table's column."""
    existing = f"The file has: {', '.join(table.columns)}" if table.columns else "The file has no columns"
    lower = {name.lower(): name for name in reversed(table.columns)}
    chosen: dict[str, str] = {}
    for role in dict.fromkeys((*roles, *optional, *columns)):
        if role in columns:
            if str(columns[role]) not in table.columns:
                raise RequestError(f"the column for {role!r} is missing in {path}", columns[role], existing)
            chosen[role] = str(columns[role])
        elif usual := [name for name in USUAL_NAMES.get(role, (role,)) if name.lower() in lower]:
            chosen[role] = lower[usual[0]]
    if missing := [role for role in roles if role not in chosen]:
        if not table.columns:
            raise RequestError("the data file has no rows", path, "Give a file with at least one row")
        hint = "; give the columns, by position (from 0) where the file has no header line"
        raise RequestError(f"columns are missing in {path}", ", ".join(missing), existing + hint)
    return chosen


def _digest_value(digest: Any, role: str, value: Any) -> None:
    if isinstance(value, np.ndarray):
        head = f"{value.dtype.str}{value.shape}"
        body = np.ascontiguousarray(value).tobytes()
    elif isinstance(value, Path | bytes):
        head = "bytes"
        body = value if isinstance(value, bytes) else value.read_bytes()
    else:
        head = "json"
        if isinstance(value, list):
            value = [[one, one.start] if isinstance(one, Answer) and one.start is not None else one for one in value]
        body = json.dumps(value, ensure_ascii=False).encode()
    digest.update(f"{role}:{head}:{len(body)}:".encode())
    digest.update(body)
