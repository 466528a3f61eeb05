"""Texts as a terminal can show them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_ASCII = str.maketrans({"×": "x", "–": "-", "−": "-", "…": "...", "≥": ">="})
_SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


def writable(text: str, console: Console) -> str:
    """`text` in what the terminal can encode, without control characters that could rewrite the screen."""
    text = "".join(character if character.isprintable() else " " for character in text)
    if console.encoding.lower().startswith("utf"):
        return text
    text = text.replace("×10", "e").translate(_SUPERSCRIPTS).translate(_ASCII)
    return text.encode(console.encoding, "replace").decode(console.encoding)
