"""Progress on stderr: what is happening and for how long. A live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.status import Status


class Progress:
    """Tells a person how a run goes.

    Args:
        quiet: Say nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._started = time.monotonic()
        self._status: Status | None = None
        self._doing = ""
        self._terminal = sys.stderr.isatty() and not quiet

    def say(self, text: str) -> None:
        """One line that stays."""
        if self.quiet:
            return
        if self._status is not None:
            self._status.console.print(f"[dim]{self._elapsed()}[/dim] {_escape(text)}", highlight=False)
        else:
            print(f"{self._elapsed()} {text}", file=sys.stderr, flush=True)

    def update(self, text: str) -> None:
        """What the step that runs now is doing; replaced by the next."""
        if self._status is not None:
            self._status.update(f"{_escape(self._doing)} [dim]· {_escape(text)}[/dim]")

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """A step that takes a while: shown while it runs, kept as a line with its duration when it is done."""
        began = time.monotonic()
        self._doing = text
        if self._terminal:
            from rich.console import Console

            self._status = Console(stderr=True).status(_escape(text))
            self._status.start()
        else:
            self.say(f"{text} …")
        try:
            yield
        finally:
            if self._status is not None:
                self._status.stop()
                self._status = None
        seconds = time.monotonic() - began
        if seconds >= 0.05:
            self.say(f"{text}: done in {seconds:.1f} s")

    def _elapsed(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        return f"[{minutes:02d}:{seconds:02d}]"


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
