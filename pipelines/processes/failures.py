"""How a failure travels from a child to its parent: every exception becomes a `PlanishError`, and that becomes JSON."""

from __future__ import annotations

import errno
import importlib
import shutil
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from exporter.errors import (
    ERROR_BY_EXIT_STATUS,
    CancelledError,
    EnvironmentLackError,
    InternalError,
    NoSpaceError,
    PlanishError,
)

_NO_SPACE_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
_FULL_BELOW_BYTES = 64 << 10
_NO_SPACE_TEXTS = ("No space left on device", "Disk quota exceeded")
_NO_MEMORY_TEXTS = ("DefaultCPUAllocator: can't allocate memory", "std::bad_alloc", "Cannot allocate memory")


def as_planish_error(
    error: BaseException, *, log: Path | None = None, doing: str = "a step", places: Iterable[str | Path] = ()
) -> PlanishError:
    """What to tell the user about `error`.

    A `PlanishError` stays what it is, a lack of disk space or memory anywhere in the chain of causes becomes an
    `EnvironmentLackError`, an interrupt a `CancelledError`, and everything else an `InternalError` whose value is the
    exception's last line and whose remedy names the log.

    Args:
        error: What was raised.
        log: Where the details are.
        doing: What failed, for the user.
        places: Where it was writing. Native code often fails on a full disk without saying so ("iostream error"); where
            one of these has no space left, that is what is told.
    """
    deliberate = isinstance(error, PlanishError) and not isinstance(error, InternalError)
    if not deliberate:
        for link in chain(error):
            if (lack := _lack(link)) is not None:
                return lack
    if isinstance(error, PlanishError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return CancelledError(f"{doing} was interrupted")
    for place in places:
        if _is_full(Path(place)):
            return NoSpaceError("there is no disk space left", str(place), "Free some, or choose another folder")
    return InternalError(f"{doing} failed", last_line(error), see(log))


def chain(error: BaseException) -> Iterator[BaseException]:
    """`error`, its causes, contexts and, for a group, its members; each once."""
    waiting: list[BaseException] = [error]
    seen: set[int] = set()
    while waiting:
        link = waiting.pop()
        if id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        waiting += [other for other in (link.__cause__, link.__context__) if other is not None]
        if isinstance(link, BaseExceptionGroup):
            waiting += link.exceptions


def _lack(error: BaseException) -> EnvironmentLackError | None:
    text = "" if isinstance(error, PlanishError) else str(error)
    if (isinstance(error, OSError) and error.errno in _NO_SPACE_ERRNOS) or any(t in text for t in _NO_SPACE_TEXTS):
        return NoSpaceError(
            "there is no disk space left", getattr(error, "filename", None), "Free some, or choose another folder"
        )
    no_memory = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if no_memory or any(t in text for t in _NO_MEMORY_TEXTS):
        return EnvironmentLackError(
            "there is not enough memory", text.strip().splitlines()[-1] if text.strip() else None, "Free some memory"
        )
    return None


def _is_full(place: Path) -> bool:
    try:
        return shutil.disk_usage(place).free < _FULL_BELOW_BYTES
    except OSError:
        return False


def last_line(error: BaseException) -> str:
    """``Type: message`` on one line, of a long message the first line with something on it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def see(log: Path | None) -> str:
    """The remedy of an error that a user cannot have caused."""
    where = f". The details are in {log}" if log is not None else ""
    return f"This is a bug in Planish or in a library below it{where}"


def encode(error: PlanishError) -> dict[str, Any]:
    """`error` as JSON, with the class to raise in the parent."""
    kind = type(error)
    return {
        "class": f"{kind.__module__}:{kind.__qualname__}",
        "what": error.what,
        "value": error.value if isinstance(error.value, (str, int, float, bool, type(None))) else str(error.value),
        "remedy": error.remedy,
        "exit": error.exit_status,
    }


def decode(data: dict[str, Any]) -> PlanishError:
    """The error that `encode` wrote, of the same class where it can be had here, else of the nearest base."""
    arguments = (data["what"], data["value"], data["remedy"])
    module, _, name = data["class"].partition(":")
    try:
        kind = getattr(importlib.import_module(module), name)
        if isinstance(kind, type) and issubclass(kind, PlanishError):
            return kind(*arguments)
    except (ImportError, AttributeError, TypeError):  # defined in a local scope, or made from other arguments
        pass
    return ERROR_BY_EXIT_STATUS.get(data["exit"], InternalError)(*arguments)


def ended_silently(doing: str, returncode: int, log: Path) -> InternalError:
    """The error for a child that ended without saying why; `returncode` as `subprocess` has it."""
    if returncode >= 0:
        return InternalError(f"{doing} ended without a result", f"exit status {returncode}", see(log))
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    hint = "Perhaps the machine ran out of memory. " if -returncode == signal.SIGKILL else ""
    return InternalError(f"{doing} was ended by a signal", name, hint + see(log))
