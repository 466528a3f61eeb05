"""What is made for one shape of the inputs, held for the shapes that come often."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")

PATIENCE = 64
"""How often a shape has to come before something is made for it: making things takes as long as many runs."""
REMEMBERED = 1024


class ShapeCache(Generic[T]):
    """Holds what was made for up to `most` shapes.

    A shape that comes `PATIENCE` times gets a place. When all are taken, it takes that of the one that came longest
    ago, and with each such change the next has to come twice as often: where shapes are many, little time is lost with
    making things for them.

    Args:
        most: Places, at least one.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.held: OrderedDict[Hashable, T] = OrderedDict()
        self._patience = PATIENCE
        self._came: OrderedDict[Hashable, int] = OrderedDict()

    def get(self, shape: Hashable, make: Callable[[], T]) -> T:
        """What is held for a shape; made at once where it is not."""
        if shape not in self.held:
            self.held[shape] = make()
            self._came.pop(shape, None)
            while len(self.held) > self.most:
                self.held.popitem(last=False)
        self.held.move_to_end(shape)
        return self.held[shape]

    def find(self, shape: Hashable, make: Callable[[], T]) -> T | None:
        """What is held for a shape, made where the shape is worth it; else ``None``."""
        if shape in self.held:
            return self.get(shape, make)
        came = self._came.pop(shape, 0) + 1
        if came >= self._patience:
            if len(self.held) >= self.most:
                self._patience *= 2
            return self.get(shape, make)
        self._came[shape] = came
        if len(self._came) > REMEMBERED:
            self._came.popitem(last=False)
        return None
