"""The engines that this user built here: their SHA-256 digests, remembered in the cache, so that `load` may open them.

An engine is native code. A manifest beside it proves that it is whole, not where it comes from, so trust is a matter of
this machine: an empty file named by the digest, in a folder that only this user can write.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from exporter.errors import EnvironmentLackError, InternalError
from pipelines.cache import default_root
from pipelines.disk import disk_errors

_DIGEST = re.compile("[0-9a-f]{64}")


def engines_folder() -> Path:
    """Where the digests are: ``engines`` in the cache's root."""
    return default_root() / "engines"


def remember_engine(digest: str) -> None:
    """Trust an engine that was built here from now on.

    Args:
        digest: SHA-256 of the engine's file, 64 lower-case hex digits.

    Raises:
        EnvironmentLackError: The cache cannot be written, or is not this user's.
        InternalError: Not a SHA-256 digest.
    """
    if not _DIGEST.fullmatch(digest):
        raise InternalError("not a SHA-256 digest", digest)
    folder = engines_folder()
    with disk_errors(folder, "set PLANISH_CACHE to another folder"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True, mode=0o700)
        if not _private(folder):
            _start_again(folder)
        (folder / digest).touch(mode=0o600, exist_ok=True)


def trusted() -> frozenset[str]:
    """The digests of all engines that this user built here.

    Nothing is trusted where the folder is missing or cannot be read, or where others could have written in it.
    """
    folder = engines_folder()
    try:
        if not _private(folder):
            return frozenset()
        return frozenset(entry.name for entry in os.scandir(folder) if _is_marker(entry))
    except OSError:  # no folder, or no right to read it: nothing was remembered
        return frozenset()


def _start_again(folder: Path) -> None:
    """Make a folder private in which others could have written: what they may have put there is not adopted."""
    if folder.is_symlink():
        raise EnvironmentLackError("a link is where the trusted engines are remembered", folder, "Remove it")
    folder.chmod(0o700)  # refused by the system where the folder is somebody else's
    for entry in folder.iterdir():
        if _DIGEST.fullmatch(entry.name) and not entry.is_dir():
            entry.unlink()


def _is_marker(entry: os.DirEntry[str]) -> bool:
    return bool(_DIGEST.fullmatch(entry.name)) and entry.is_file(follow_symlinks=False)


def _private(folder: Path) -> bool:
    """Whether `folder` is a real folder that belongs to this user and that nobody else may write in."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        return False
    mine = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    return mine and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
