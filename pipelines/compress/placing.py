"""Where a model folder goes that somebody asked for."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from exporter.errors import RequestError
from pipelines.disk import disk_errors, make_folder, remove_tree

_REMEDY = "choose another --out"
_MARK = ".planish-model-"
_LAST = "config.json"
"""Without it nothing takes a folder for a model."""


def free_place(out: Path) -> Path:
    """Make sure, before any work, that a model folder can be written there; folders above it are made.

    Args:
        out: An empty folder (a mounted one, say), or a name that is free.

    Raises:
        RequestError: There is something already, or no folder can be made there.
        EnvironmentLackError: Writing is not allowed there, or no space is left.
    """
    _tidy(out)
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        names = sorted(path.name for path in out.iterdir())[:3] if out.is_dir() else []
        told = f"{out}: {', '.join(names)}" if names else out
        raise RequestError("there is something already where the model is to go", told, "Choose another --out")
    with _scratch(out):
        return out


def put(folder: Path, out: Path) -> None:
    """Copy a model folder to where it is wanted, whole or not at all.

    A process that is killed while it fills a folder that was there leaves it without ``config.json``.

    Raises:
        RequestError: Something has appeared there meanwhile.
        EnvironmentLackError: Writing is not allowed there any more, or no space is left.
    """
    free_place(out)
    with _scratch(out) as scratch:
        whole, moved = scratch / "whole", []
        shutil.copytree(folder, whole)
        if not out.is_dir():
            whole.rename(out)
            return
        try:
            for path in sorted(whole.iterdir(), key=lambda path: path.name == _LAST):
                moved.append(path.rename(out / path.name))
        except OSError:
            for path in moved:
                remove_tree(path)
            raise


def _tidy(out: Path) -> None:
    """Remove what a killed process left while it copied."""
    for folder in (out, out.absolute().parent):
        if folder.is_dir():
            for path in folder.glob(f".{glob.escape(out.name)}{_MARK}????????"):
                remove_tree(path)


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A folder on the same file system: in `out` where that is there, else beside it."""
    above = out if out.is_dir() else make_folder(out.absolute().parent, _REMEDY)
    with disk_errors(out, _REMEDY), disk_errors(above, _REMEDY):
        try:
            scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}{_MARK}", dir=above))
        except FileNotFoundError as error:  # a folder that says it is there and takes nothing, as /proc
            raise RequestError("no folder can be made there", out, "Choose another --out") from error
        try:
            yield scratch
        finally:
            remove_tree(scratch)
