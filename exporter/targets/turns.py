"""Turns of the threads of a process that work on an NVIDIA GPU, capture there, or free what nobody holds any more."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from exporter.targets.own_thread import OwnThread


class Turns:
    """Who works on the GPU in this process, many at a time, and who captures: alone.

    While ONNX Runtime captures, no other thread may allocate or wait (CUDA's global mode of capturing): both would
    fail. Who captures waits until nobody works and holds back who comes meanwhile. A thread that works cannot capture.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._working = self._waiting = 0
        self._captures = False

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Work, beside others."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._captures)
            self._working += 1
        try:
            yield
        finally:
            with self._changed:
                self._working -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """Capture, alone."""
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not self._working and not self._captures)
            finally:  # Ctrl-C ends the waiting too
                self._waiting -= 1
                self._changed.notify_all()
            self._captures = True
        try:
            yield
        finally:
            with self._changed:
                self._captures = False
                self._changed.notify_all()


TURNS = Turns()


@functools.cache
def frees() -> OwnThread:
    """Who waits for a turn to free what nobody holds any more."""
    return OwnThread("planish-frees")


def free_in_turn(owner: object, held: list[Any]) -> None:
    """What the owner holds on the GPU is to be freed when it is collected: later, in a turn and in a thread for that.

    The owner may be let go anywhere, amid a capture too. To free something on the GPU then would spoil the capture, and
    to destroy a graph that ONNX Runtime captured ends the process
    (https://github.com/microsoft/onnxruntime/pull/32081).

    Args:
        owner: Who is the only one to use it.
        held: The last references to it that there will be, beside those of the owner. They must not lead back to the
            owner. Emptied by the owner's own `close`, there is nothing to free.
    """
    weakref.finalize(owner, frees().give, functools.partial(_free, held)).atexit = False


def _free(held: list[Any]) -> None:
    with TURNS.working():
        held.clear()
