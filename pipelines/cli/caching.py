"""``planish cache``: what the stage cache holds, and emptying it."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import asdict

from pipelines.cache import Cache, CleanResult, Entry
from pipelines.cli.screens import Screen, emit
from pipelines.disk import disk_errors
from pipelines.report.formats import duration, size

_DAY_S = 86_400


def list_cache(as_json: bool) -> int:
    """Print the cache's entries, the last used first; returns the exit status.

    Raises:
        RequestError: The cache's folder is a file, or no folder can be there.
        EnvironmentLackError: The folder cannot be read.
    """
    cache = _cache()
    entries = cache.ls()
    total = sum(entry.size_bytes for entry in entries)
    if as_json:
        document = {"root": str(cache.root), "size_bytes": total, "entries": [asdict(entry) for entry in entries]}
        emit(document)
        return 0
    screen = Screen()
    if entries:
        rows = [
            (e.stage, size(e.size_bytes), age(e.unused_s), _state(e), e.id.rpartition("-")[2][:12]) for e in entries
        ]
        screen.table(("Stage", "Size", "Last used", "State", "Digest"), rows, right=(1,))
        screen.line("")
    screen.line(f"{_entries(len(entries))}, {size(total)}, in {cache.root}")
    screen.show()
    return 0


def clean_cache(older_than_days: float | None, as_json: bool) -> int:
    """Remove what no running process uses: everything, or what was not used for so many days.

    Broken entries and what dead runs left go in any case.

    Returns:
        The exit status.

    Raises:
        RequestError: The cache's folder is a file, or no folder can be there.
        EnvironmentLackError: The folder cannot be written.
    """
    cache = _cache()
    if older_than_days is None:
        done = cache.clean(everything=True)
    else:
        done = cache.clean(older_than_s=older_than_days * _DAY_S)
    if as_json:
        emit({"root": str(cache.root), **asdict(done)})
    else:
        _show_cleaned(done, cache)
    return 0


def _cache() -> Cache:
    cache = Cache()
    with disk_errors(cache.root, "set PLANISH_CACHE to another folder"), suppress(FileNotFoundError):
        os.scandir(cache.root).close()
    return cache


def age(seconds: float) -> str:
    """How long ago something was, in the largest unit that fits: ``5 min ago``."""
    if seconds >= 2 * _DAY_S:
        return f"{seconds / _DAY_S:.0f} days ago"
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:.0f} h ago"
    if seconds >= 60:
        return f"{seconds / 60:.0f} min ago"
    return f"{duration(round(seconds))} ago" if seconds >= 1 else "now"


def _show_cleaned(done: CleanResult, cache: Cache) -> None:
    screen = Screen()
    screen.line(f"Removed {_entries(len(done.removed))}, freed {size(done.freed_bytes)}, in {cache.root}")
    if done.in_use:
        screen.line(f"Left {_entries(len(done.in_use))} that a running process uses: {', '.join(done.in_use)}")
    screen.show()


def _state(entry: Entry) -> str:
    if entry.in_use:
        return "in use"
    return "" if entry.sound else "broken"


def _entries(count: int) -> str:
    return f"{count} {'entry' if count == 1 else 'entries'}"
