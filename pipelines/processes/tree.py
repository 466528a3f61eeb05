"""The processes that this one started, and the promise that none of them outlives it."""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from pipelines.disk import disk_errors
from pipelines.processes import watcher
from pipelines.processes.watcher import TREE_VARIABLE


class _Tree:
    """The watcher of one process and the groups registered with it."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.token = secrets.token_hex(8)
        self.scratch = Path(tempfile.gettempdir()) / f"planish-{self.token}"
        self.groups: set[int] = set()
        self._process: subprocess.Popen[bytes] | None = None

    def add(self, group: int) -> None:
        self.groups.add(group)
        self._tell(f"+{group}\n")

    def remove(self, group: int) -> None:
        self.groups.discard(group)
        self._tell(f"-{group}\n")

    def ensure_watcher(self) -> None:
        """Start the watcher unless it lives; a new one is told about the groups that exist already."""
        if self._process is not None and self._process.poll() is None:
            return
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", watcher.__file__, str(self.owner), self.token, str(self.scratch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
            bufsize=0,
        )
        for group in self.groups:
            self._write(f"+{group}\n")

    def close(self) -> None:
        """Let the watcher do its work now, and see it off."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5.0)

    def _tell(self, line: str) -> None:
        self.ensure_watcher()
        try:
            self._write(line)
        except BrokenPipeError:  # it was killed a moment ago; the next one hears of every group
            self.ensure_watcher()

    def _write(self, line: str) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.write(line.encode())


_lock = threading.RLock()
_current: _Tree | None = None


def _tree() -> _Tree:
    global _current
    if _current is None or _current.owner != os.getpid():  # a fork without exec starts a tree of its own
        _current = _Tree()
    return _current


def environment(extra: dict[str, str]) -> tuple[dict[str, str], str, Path]:
    """The environment for a new child, the token in it by which the child and its descendants are known, and the folder
    for their temporary files, which is there already.

    Tokens of nested runs are joined, so that each run in a chain finds its own descendants.
    """
    with _lock:
        tree = _tree()
        number = secrets.token_hex(4)
        token = f"{tree.token}.{number}"
        scratch = tree.scratch / number
    with disk_errors(scratch.parent.parent, "set TMPDIR to another folder"):
        scratch.parent.mkdir(mode=0o700, exist_ok=True)
        scratch.mkdir()
    inherited = os.environ.get(TREE_VARIABLE)
    joined = f"{inherited}:{token}" if inherited else token
    root = str(Path(__file__).resolve().parents[2])
    search = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
    own = {"PYTHONPATH": search, "TMPDIR": str(scratch), **extra, TREE_VARIABLE: joined}
    return {**os.environ, **own}, token, scratch


def prepare() -> None:
    """Have a watcher before there is anything to watch."""
    with _lock:
        _tree().ensure_watcher()


def register(group: int) -> None:
    """From now on the process group `group` dies with this process."""
    with _lock:
        _tree().add(group)


def unregister(group: int) -> None:
    """The group has ended. Call it before its leader is reaped: afterwards its number may mean another group."""
    with _lock:
        _tree().remove(group)


def kill_all() -> None:
    """Kill every registered group of this process."""
    with _lock:
        if _current is None or _current.owner != os.getpid():
            return
        for group in list(_current.groups):
            watcher.kill_group(group)


def _leave_nothing() -> None:
    kill_all()
    if _current is not None and _current.owner == os.getpid():
        _current.close()


atexit.register(_leave_nothing)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP unwind the stack (`SystemExit`, status 128 + number) instead of ending at once.

    So `finally` clauses run and children are killed. Handlers that somebody else set are left alone, and so is
    everything outside the main thread, where Python allows no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, _exit)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _exit(number: int, frame: FrameType | None) -> Any:
    raise SystemExit(128 + number)
