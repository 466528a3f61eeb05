"""Locks between processes on the files of one machine: the kernel drops them with the process, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from exporter.errors import EnvironmentLackError


class FileLock:
    """An advisory `flock` on a file that is made when needed. Hold it with `acquire`, end it with `release`.

    The file carries nothing: who holds it is known to the kernel, so a killed process leaves no stale lock. A lock
    belongs to the object, so two objects exclude each other in one process as they do in two.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def acquire(self, *, shared: bool = False, wait: bool = True, on_wait: Callable[[], None] | None = None) -> bool:
        """Take the lock; `False` only where `wait` is false and somebody else has it.

        Args:
            shared: Several may hold it at once, and nobody exclusively meanwhile.
            wait: Wait for the others; Ctrl-C still interrupts.
            on_wait: Called once before waiting begins.

        Raises:
            EnvironmentLackError: The file system knows no locks.
        """
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        told = False
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                if not _flock(fd, kind | fcntl.LOCK_NB, self.path):
                    if not wait:
                        os.close(fd)
                        return False
                    if on_wait is not None and not told:
                        told = True
                        on_wait()
                    _flock(fd, kind, self.path)
                # Whoever cleaned up may have removed the file between open and lock: that lock would guard nothing.
                if _is_at(fd, self.path):
                    self._fd = fd
                    return True
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def release(self, *, remove: bool = False) -> None:
        """Give the lock back, removing its file if asked (only while it is held exclusively)."""
        if self._fd is not None:
            if remove:
                self.path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = None


def _flock(fd: int, operation: int, path: Path) -> bool:
    try:
        fcntl.flock(fd, operation)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise EnvironmentLackError(
            "cannot lock files there", f"{path.parent} ({error.strerror})", "Choose a local file system"
        ) from error
    return True


def _is_at(fd: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(fd)
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)
