"""Symbolic dimensions: products of an integer and the names that a model gives to its axes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

_PRODUCT = re.compile(r"^\s*[\w.]+(\s*\*\s*[\w.]+)*\s*$")


@dataclass(frozen=True)
class Dim:
    """`factor` times the product of `symbols` (sorted)."""

    factor: int
    symbols: tuple[str, ...] = ()

    @property
    def static(self) -> bool:
        """Whether this is a plain integer."""
        return not self.symbols

    @property
    def known(self) -> bool:
        """Whether it is made of names that the model gives to its axes."""
        return not any(symbol.startswith("?") for symbol in self.symbols)

    def __mul__(self, other: Dim) -> Dim:
        return Dim(self.factor * other.factor, tuple(sorted(self.symbols + other.symbols)))

    def over(self, other: Dim) -> Dim | None:
        """The exact quotient, or ``None``."""
        rest = list(self.symbols)
        for symbol in other.symbols:
            if symbol not in rest:
                return None
            rest.remove(symbol)
        if other.factor == 0 or self.factor % other.factor:
            return None
        return Dim(self.factor // other.factor, tuple(rest))

    def __str__(self) -> str:
        if self.static:
            return str(self.factor)
        return "*".join((str(self.factor), *self.symbols) if self.factor != 1 else self.symbols)


ONE = Dim(1)
Shape = tuple[Dim, ...]


def unknown(value: ir.Value, index: int) -> Dim:
    """A dimension that equals only itself."""
    return Dim(1, (f"?{value.name}.{index}",))


def volume(shape: Sequence[Dim]) -> Dim:
    """The number of elements."""
    return prod(shape, start=ONE)


def parse_dim(recorded: int | str | None) -> Dim | None:
    """A dimension as the file records it: an integer, a name, or a product of such."""
    if isinstance(recorded, int):
        return Dim(recorded)
    if not recorded:
        return None
    if not _PRODUCT.match(recorded):
        return Dim(1, (recorded.replace(" ", ""),))
    parts = [part.strip() for part in recorded.split("*")]
    numbers = [int(part) for part in parts if part.isdigit()]
    return Dim(prod(numbers), tuple(sorted(part for part in parts if not part.isdigit())))


def broadcast(shapes: Sequence[Shape]) -> Shape | None:
    """The shape that `shapes` broadcast to; ``None`` where two dimensions may or may not agree."""
    rank = max((len(shape) for shape in shapes), default=0)
    result = []
    for axis in range(-rank, 0):
        dims = {shape[axis] for shape in shapes if len(shape) >= -axis} - {ONE}
        # Beside an integer above 1, a symbol can only be that integer or 1.
        dims = {dim for dim in dims if dim.static} or dims
        if len(dims) > 1:
            return None
        result.append(dims.pop() if dims else ONE)
    return tuple(result)
