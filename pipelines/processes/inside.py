"""What code that runs as a job can use: progress messages, and for workers commands and replies.

Outside a job `report_progress` goes to the log and the rest is an error, so job functions stay plain functions.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


class _Line:
    """The pipes to the parent: JSON documents, one a line."""

    def __init__(self, commands: BinaryIO, messages: BinaryIO) -> None:
        self.commands = commands
        self.messages = messages
        self.lock = threading.Lock()

    def send(self, kind: str, content: Any) -> None:
        data = json.dumps({"kind": kind, "content": content}, default=_plain).encode() + b"\n"
        with self.lock:
            self.messages.write(data)
            self.messages.flush()


_line: _Line | None = None


def report_progress(text: str) -> None:
    """Tell the parent what is happening, in a few words; it shows them to the user."""
    if _line is None:
        logging.getLogger("planish").info(text)
    else:
        _line.send("progress", text)


def send(kind: str, content: Any) -> None:
    """Send the parent a message; only inside a job."""
    if _line is None:
        raise RuntimeError("not inside a job")
    _line.send(kind, content)


def commands() -> Iterator[dict[str, Any]]:
    """The parent's commands, until it sends no more; only inside a job."""
    if _line is None:
        raise RuntimeError("not inside a job")
    while data := _line.commands.readline():
        yield json.loads(data)


def open_line(messages_fd: int) -> None:
    """Take over stdin and `messages_fd` as the pipes to the parent, away from the job's own children."""
    global _line
    commands_fd = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.set_inheritable(messages_fd, False)
    _line = _Line(os.fdopen(commands_fd, "rb"), os.fdopen(messages_fd, "wb"))


def peak_rss_bytes() -> int:
    """Peak resident memory of this process in bytes.

    From ``VmHWM``, not ``ru_maxrss``: Linux hands the latter on through `exec`, so that a small child of a large
    parent would report the parent's.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a NumPy scalar
        return value.item()
    raise TypeError(f"not JSON: {type(value).__name__}")
