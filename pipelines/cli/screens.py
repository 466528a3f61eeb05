"""Screens: facts for people, as headings, pairs and tables. Colours on a terminal only, plain text elsewhere."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_PLAIN_WIDTH = 120
"""Columns where there is no terminal to ask: files and pipes."""
_STYLES = {
    "passed": "green",
    "inconclusive": "yellow",
    "failed": "red",
    "skipped": "dim",
    "available": "green",
    "unavailable": "yellow",
    "missing": "red",
    "unfit": "red",
    "not installed": "dim",
}
_ASCII = str.maketrans({"×": "x", "–": "-", "−": "-", "…": "...", "·": "-", "≥": ">=", "≤": "<="})


def emit(document: Mapping[str, Any]) -> None:
    """Print the one JSON document of a command on stdout.

    Raises:
        ValueError: A number in it is not finite.
    """
    print(json.dumps(document, indent=2, allow_nan=False), flush=True)


class Screen:
    """A screen in the making; `show` prints it on stdout. Texts are shown as they are: none is markup."""

    def __init__(self) -> None:
        from rich.console import Console

        terminal = sys.stdout.isatty()
        width = None if terminal or os.environ.get("COLUMNS", "").isdigit() else _PLAIN_WIDTH
        # Not left to the environment: FORCE_COLOR, which CI systems like to set, would colour files and pipes.
        self._console = Console(force_terminal=terminal, width=width, highlight=False)
        self._parts: list[Any] = []

    @property
    def console(self) -> Console:
        """What the parts are printed on: it knows the width and the encoding."""
        return self._console

    def part(self, renderable: Any) -> None:
        """Anything that rich can print."""
        self._parts.append(renderable)

    def heading(self, text: str) -> None:
        """A section's title, with an empty line before it."""
        from rich.text import Text

        if self._parts:
            self._parts.append(Text(""))
        self._parts.append(Text(self._writable(text), style="bold"))

    def line(self, text: str, style: str = "") -> None:
        """One sentence; `style` is a style of rich or a status."""
        from rich.text import Text

        self._parts.append(Text(self._writable(text), style=_STYLES.get(style, style)))

    def pairs(self, pairs: Iterable[tuple[str, Any]]) -> None:
        """Names and values in two columns; those without a value are left out."""
        self.table(None, [(name, value) for name, value in pairs if value not in (None, "", [], ())])

    def table(self, titles: Sequence[str] | None, rows: Iterable[Sequence[Any]], *, right: Iterable[int] = ()) -> None:
        """Rows in columns; without `titles` the first column is set apart. `right`: the columns of numbers."""
        from rich.table import Table
        from rich.text import Text

        rows = list(rows)
        if not rows:
            return
        table = Table(
            box=None, show_header=titles is not None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim"
        )
        numbers = set(right)
        for index in range(len(rows[0])):
            title = Text(self._writable(titles[index])) if titles else ""
            # Names and numbers stay whole; the last column, a path or a sentence, takes what room is left.
            table.add_column(
                title,
                justify="right" if index in numbers else "left",
                style="dim" if titles is None and index == 0 else "",
                overflow="fold",
                no_wrap=index in numbers or (titles is None and index == 0),
            )
        for row in rows:
            table.add_row(*(self._cell(value) for value in row))
        self._parts.append(table)

    def show(self) -> None:
        """Print everything."""
        with self._console.capture() as captured:
            for part in self._parts:
                self._console.print(part)
        # Lines are padded to the table's width, which is a nuisance wherever text is copied or compared.
        text = "\n".join(line.rstrip() for line in captured.get().splitlines())
        # Through stdout itself, so that a reader that went away is a BrokenPipeError and not rich's own way to exit.
        print(text, flush=True)

    def _cell(self, value: Any) -> Any:
        from rich.text import Text

        text = self._writable("" if value is None else str(value))
        return Text(text, style=_STYLES.get(text, ""))

    def _writable(self, text: str) -> str:
        """`text` in what the terminal can encode, without characters that could rewrite the screen."""
        lines = ("".join(c if c.isprintable() else " " for c in line) for line in text.split("\n"))
        text = "\n".join(lines)
        encoding = self._console.encoding
        if not encoding.lower().startswith("utf"):
            text = text.translate(_ASCII)
        return text.encode(encoding, "replace").decode(encoding)
