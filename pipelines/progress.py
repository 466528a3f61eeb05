"""Progress on stderr: what is happening and for how long. A live line on a terminal, plain lines elsewhere, where a
step that takes long says now and then how far it is."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.status import Status


_SILENT_S = 30.0
"""Seconds without a word, where there is no terminal, after which the next thing that a step does has a line."""


class Progress:
    """Tells a person how a run goes. Steps may run side by side, each in a thread of its own.

    Args:
        quiet: Say nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._started = time.monotonic()
        self._spoke = self._started
        self._status: Status | None = None
        self._doing: dict[int, tuple[str, str]] = {}  # by thread, what runs now and what is said of it
        self._lock = threading.RLock()
        self._terminal = sys.stderr.isatty() and not quiet

    def say(self, text: str) -> None:
        """One line that stays."""
        if self.quiet:
            return
        with self._lock:
            self._spoke = time.monotonic()
            if self._status is not None:
                self._status.console.print(f"[dim]{self._elapsed()}[/dim] {_escape(text)}", highlight=False)
            else:
                print(f"{self._elapsed()} {text}", file=sys.stderr, flush=True)

    def update(self, text: str) -> None:
        """What the step of this thread is doing; replaced by the next."""
        with self._lock:
            step, _ = self._doing.get(threading.get_ident(), ("", ""))
            self._show((step, text))
            if not self._terminal and time.monotonic() - self._spoke >= _SILENT_S:
                self.say(f"{step}: {text}" if step else text)

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """A step that takes a while: shown while it runs, kept as a line with its duration when it is done."""
        began = time.monotonic()
        self._show((text, ""))
        if not self._terminal:
            self.say(f"{text} …")
        try:
            yield
        finally:
            self._show(None)
        seconds = time.monotonic() - began
        if seconds >= 0.05:
            self.say(f"{text}: done in {seconds:.1f} s")

    def _show(self, doing: tuple[str, str] | None) -> None:
        """Note what this thread does, or that it does nothing any more; a terminal's live line shows it."""
        with self._lock:
            if doing is None:
                self._doing.pop(threading.get_ident(), None)
            else:
                self._doing[threading.get_ident()] = doing
            if not self._terminal:
                return
            line = "  |  ".join(
                f"{_escape(step)} [dim]· {_escape(said)}[/dim]" if said else _escape(step)
                for step, said in self._doing.values()
            )
            if not self._doing:
                if self._status is not None:
                    self._status.stop()
                    self._status = None
            elif self._status is None:
                from rich.console import Console

                self._status = Console(stderr=True).status(line)
                self._status.start()
            else:
                self._status.update(line)

    def _elapsed(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        return f"[{minutes:02d}:{seconds:02d}]"


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
