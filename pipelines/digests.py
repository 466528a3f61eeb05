"""Digests of files, folders and plain data: what the cache, the recipe and the bundle identify things by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exporter.digests import file_digest
from exporter.errors import RequestError


def canonical_json(data: Any) -> bytes:
    """One byte string per value: sorted keys, no spaces, UTF-8, no NaN or infinity.

    Raises:
        ValueError: A float is not finite.
        TypeError: Something in `data` is not plain JSON data.
    """
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "surrogatepass")


def json_digest(data: Any) -> str:
    """SHA-256 (64 hex digits) of the canonical JSON of `data`."""
    return hashlib.sha256(canonical_json(data)).hexdigest()


def walk_files(folder: Path) -> Iterator[Path]:
    """Everything under `folder` that is not itself a folder, in a fixed order; links are named, not followed."""
    for path in sorted(folder.iterdir(), key=lambda p: p.name):
        if path.is_dir() and not path.is_symlink():
            yield from walk_files(path)
        else:
            yield path


def path_digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder's relative file names and contents (where it lies does not matter).

    Raises:
        RequestError: There is nothing at `path`.
    """
    if path.is_dir():
        return json_digest({p.relative_to(path).as_posix(): file_digest(p) for p in walk_files(path) if p.is_file()})
    if not path.is_file():
        raise RequestError("no such file or folder", path, "Check the path")
    return file_digest(path)
