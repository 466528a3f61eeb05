"""The stage cache: what a stage made is kept under the digest of everything that it depends on.

Layout under the root::

    stages/<stage>-<digest>/   a finished entry: the stage's files and record.json; appears whole, by one rename
    tmp/<entry>-<pid>-…/       a stage at work, or an entry on its way out; dead ones go with the next run
    training/<entry>/          checkpoints of a stage that trains, until it is done: it goes on from there
    locks/<entry>.make, .use   who makes an entry, who reads it: kernel locks, which end with their process

So ``kill -9`` at any moment loses at most the running stage, two runs make nothing twice, and nothing that a run
reads is cleaned away under it.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from exporter.errors import InternalError, RequestError
from pipelines.cache_entry import RECORD, StageKey, read_record, stage_key, write_record
from pipelines.disk import disk_error, disk_errors, make_folder, remove_tree, sync_folder, sync_tree
from pipelines.locks import FileLock

__all__ = ["Cache", "CleanResult", "Entry", "StageKey", "StageResult", "default_root", "log_folder", "stage_key"]

_REMEDY = "set PLANISH_CACHE to another folder"
_PRIVATE = "planish-no-cache-"
TRAINING = "training"


@dataclass(frozen=True)
class StageResult:
    """What a stage left.

    Attributes:
        folder: Its files, to be read and never edited; stay as long as the `Cache` is open.
        record: What its function returned.
        cached: It was made by an earlier run (or by one that ran at the same time).
        seconds: Time that this call took.
        made_seconds: Time that making it took.
    """

    folder: Path
    record: dict[str, Any]
    cached: bool
    seconds: float
    made_seconds: float


@dataclass(frozen=True)
class Entry:
    """A line of `Cache.ls`. Ages in seconds; `sound` is the cheap check; `in_use` by a process right now."""

    id: str
    stage: str
    size_bytes: int
    age_s: float
    unused_s: float
    sound: bool
    in_use: bool


@dataclass(frozen=True)
class CleanResult:
    """What `Cache.clean` removed, what that freed, and what it left because a running process uses it."""

    removed: tuple[str, ...]
    freed_bytes: int
    in_use: tuple[str, ...]


def default_root() -> Path:
    """``$PLANISH_CACHE``, or ``~/.cache/planish``.

    Raises:
        RequestError: It begins with the home of a user who has none.
    """
    named = os.environ.get("PLANISH_CACHE") or "~/.cache/planish"
    try:
        return Path(named).expanduser().absolute()
    except RuntimeError as error:
        raise RequestError(
            "there is no such home folder for the cache", named, _REMEDY[:1].upper() + _REMEDY[1:]
        ) from error


def log_folder() -> Path:
    """``logs`` in the cache's root, made where it is not there yet: the first that a command writes.

    Raises:
        EnvironmentLackError: The cache cannot be written.
        RequestError: ``PLANISH_CACHE`` names a file, or a place where no folder can be.
    """
    return make_folder(default_root() / "logs", _REMEDY)


class Cache:
    """A content-addressed store of stage results; a context manager, open for the length of a run.

    Args:
        root: Its folder; `default_root` if not given. Made when first needed.

    Raises:
        EnvironmentLackError: The folder cannot be written, or knows no locks.
        RequestError: There is a file where the folder should be.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = default_root() if root is None else Path(root).absolute()
        self._used: dict[str, FileLock] = {}
        self._guard = threading.Lock()
        self._ready = False
        self._private: FileLock | None = None

    @classmethod
    def disabled(cls) -> Cache:
        """A cache of this run only: a private folder, removed by `close` (after ``kill -9``, by the next one)."""
        parent = Path(tempfile.gettempdir())
        with disk_errors(parent, "set TMPDIR to another folder"):
            _remove_dead_private_roots(parent)
            root = Path(tempfile.mkdtemp(prefix=_PRIVATE, dir=parent))
            # The lock gets its name only once it is held, so nobody can mistake this folder for a dead one.
            lock = FileLock(root / "owner.new")
            lock.acquire()
            os.rename(root / "owner.new", root / "owner")
            lock.path = root / "owner"
        cache = cls(root)
        cache._private = lock
        return cache

    def get_or_make(
        self,
        key: StageKey,
        make: Callable[[Path], dict[str, Any]],
        *,
        verify: bool = False,
        on_wait: Callable[[StageKey], None] | None = None,
        on_make: Callable[[StageKey], None] | None = None,
    ) -> StageResult:
        """The result of a stage: from the cache, or made now and kept.

        Args:
            key: What the result depends on.
            make: Given an empty folder, writes its files there and returns plain JSON data (no paths of that folder;
                relative ones are fine). It may raise; then nothing is kept.
            verify: Read every file of a cached entry, not only sizes and times.
            on_wait: Called once if another process is making the same entry, before waiting for it.
            on_make: Called once before `make`.

        Raises:
            EnvironmentLackError: No space is left.
        """
        started = time.monotonic()
        with disk_errors(self.root, _REMEDY):
            self._prepare()
            self._use(key.id)
            folder = self._folder(key.id)
            if record := read_record(folder, key.id, verify=verify):
                return self._result(record, folder, True, started)
            with self._making(key.id, wait=True, on_wait=None if on_wait is None else lambda: on_wait(key)):
                if record := read_record(folder, key.id, verify=verify):  # made while this process waited
                    return self._result(record, folder, True, started)
                if on_make is not None:
                    on_make(key)
                record = self._make(key, make)
        return self._result(record, folder, False, started)

    def ls(self) -> list[Entry]:
        """The entries, the last used first.

        Raises:
            EnvironmentLackError: The folder cannot be read, or (to see what is in use) its locks cannot be opened.
            RequestError: Its name is too long.
        """
        now = time.time()
        entries = []
        with disk_errors(self.root, _REMEDY):
            for path in _subfolders(self.root / "stages"):
                with suppress(FileNotFoundError):  # somebody cleans at this moment
                    entries.append(self._entry(path, now))
        return sorted(entries, key=lambda entry: entry.unused_s)

    def clean(self, *, older_than_s: float | None = None, everything: bool = False) -> CleanResult:
        """Remove broken entries and leftovers, and entries unused for `older_than_s` seconds (or `everything`).

        The checkpoints of trainings that were interrupted go as entries do.

        Entries that a running process makes or reads stay.
        """
        removed: list[str] = []
        in_use: list[str] = []
        freed = 0
        if not self.root.is_dir():
            return CleanResult((), 0, ())
        with disk_errors(self.root, _REMEDY):
            self._prepare()
            for entry in self.ls():
                old = older_than_s is not None and entry.unused_s >= older_than_s
                if entry.sound and not everything and not old:
                    continue
                if self._remove(entry.id):
                    removed.append(entry.id)
                    freed += entry.size_bytes
                else:
                    in_use.append(entry.id)
            for path in _subfolders(self.root / TRAINING):
                old = older_than_s is not None and time.time() - path.stat().st_mtime >= older_than_s
                if not everything and not old:
                    continue
                size = sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
                with self._making(path.name, wait=False) as held:
                    if held:
                        remove_tree(path)
                        removed.append(f"{TRAINING}/{path.name}")
                        freed += size
                    else:
                        in_use.append(f"{TRAINING}/{path.name}")
        return CleanResult(tuple(removed), freed, tuple(in_use))

    def close(self) -> None:
        """Let go of every entry that this run used."""
        with self._guard:
            for lock in self._used.values():
                lock.release()
            self._used.clear()
        if self._private is not None:
            remove_tree(self.root)
            self._private.release()
            self._private = None

    def __enter__(self) -> Cache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prepare(self) -> None:
        with self._guard:
            if self._ready:
                return
            for name in ("stages", "tmp", "locks"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            tag = self.root / "CACHEDIR.TAG"  # tells backup programs to leave this folder out
            if not tag.exists():
                tag.write_text("Signature: 8a477f597d28d172789f06886806bc55\n# Stage cache of Planish\n")
            self._remove_leftovers()
            self._ready = True

    def _make(self, key: StageKey, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        folder = self._folder(key.id)
        working = Path(tempfile.mkdtemp(prefix=f"{key.id}-{os.getpid()}-", dir=self.root / "tmp"))
        try:
            working.chmod(0o755)
            began = time.monotonic()
            result = make(working)
            seconds = time.monotonic() - began
            if not isinstance(result, dict):
                raise InternalError(f"stage {key.stage!r} returned no dict", type(result).__name__)
            record = write_record(working, key, result, seconds, datetime.now(UTC).isoformat(timespec="seconds"))
            sync_tree(working)
            self._discard(folder)  # what is there was found broken
            os.rename(working, folder)
            sync_folder(folder.parent)
            return record
        except BaseException as error:
            remove_tree(working)
            if isinstance(error, Exception) and (found := disk_error(error, self.root, _REMEDY)):
                raise found from error
            raise

    def _result(self, record: dict[str, Any], folder: Path, cached: bool, started: float) -> StageResult:
        return StageResult(folder, record["result"], cached, time.monotonic() - started, record["seconds"])

    def _folder(self, entry: str) -> Path:
        return self.root / "stages" / entry

    def _use(self, entry: str) -> None:
        """Hold the entry against cleaning until `close`, and note that it was used now."""
        with self._guard:
            if entry not in self._used:
                lock = FileLock(self.root / "locks" / f"{entry}.use")
                lock.acquire(shared=True)
                self._used[entry] = lock
            os.utime(self._used[entry].path)

    @contextmanager
    def _making(self, entry: str, *, wait: bool, on_wait: Callable[[], None] | None = None) -> Iterator[bool]:
        """Be the only one who changes `entry`; gives `False` where another is and `wait` is false."""
        lock = FileLock(self.root / "locks" / f"{entry}.make")
        held = lock.acquire(wait=wait, on_wait=on_wait)
        try:
            yield held
        finally:
            lock.release()

    def _discard(self, folder: Path) -> None:
        """Move an entry out of sight in one step, then remove it. The caller is its maker."""
        if os.path.lexists(folder):
            away = Path(tempfile.mkdtemp(prefix=f"{folder.name}-{os.getpid()}-", dir=self.root / "tmp"))
            os.rename(folder, away / "old")
            remove_tree(away)

    def _remove(self, entry: str) -> bool:
        with self._making(entry, wait=False) as held:
            use = FileLock(self.root / "locks" / f"{entry}.use")
            if not held or not use.acquire(wait=False):
                return False
            try:
                self._discard(self._folder(entry))
            finally:
                use.release(remove=True)
                (self.root / "locks" / f"{entry}.make").unlink(missing_ok=True)
        return True

    def _remove_leftovers(self) -> None:
        """Remove what dead processes left in ``tmp``: who holds an entry's ``make`` lock owns its folders there."""
        for path in sorted((self.root / "tmp").iterdir()):
            entry = path.name.rsplit("-", 2)[0]
            with self._making(entry, wait=False) as held:
                if held:
                    remove_tree(path)

    def _entry(self, folder: Path, now: float) -> Entry:
        record = read_record(folder)
        size = sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
        use = self.root / "locks" / f"{folder.name}.use"
        made = (folder / RECORD if record else folder).stat().st_mtime
        used = use.stat().st_mtime if use.exists() else made
        probe = FileLock(use)
        free = not use.exists() or probe.acquire(wait=False)
        probe.release()
        stage = folder.name.rpartition("-")[0]
        return Entry(folder.name, stage, size, max(now - made, 0), max(now - used, 0), record is not None, not free)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _remove_dead_private_roots(parent: Path) -> None:
    """Remove private caches whose run was killed: they are ours, and nobody holds their lock."""
    for root in parent.glob(f"{_PRIVATE}*"):
        try:
            if root.is_symlink() or root.stat().st_uid != os.getuid() or not (root / "owner").is_file():
                continue
            lock = FileLock(root / "owner")
            if lock.acquire(wait=False):
                remove_tree(root)
                lock.release()
        except FileNotFoundError:  # another run was faster
            continue
