"""Turns of the threads of a process that work on an NVIDIA GPU, capture there, or free what nobody holds any more."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from exporter.targets.own_thread import OwnThread, stay

LONGEST_CHAIN = 3
"""What a closed session lets go waits behind it: its bindings, and what they hold, the runtime's session."""
LAST_SECONDS = 10
"""So long the end of the process waits for threads that work on the GPU."""


class Turns:
    """Who works on the GPU in this process, many at a time, and who captures: alone.

    While ONNX Runtime captures, no other thread may allocate or wait (CUDA's global mode of capturing): both would
    fail. Who captures waits until nobody works and holds back who comes meanwhile; those whom it held back go before
    the next one who captures. A thread that works cannot capture.

    When the process ends, daemon threads get no turn any more and come out of none: native code, and be it that of a
    tensor that is let go, which comes back to an interpreter that is gone, ends the process with SIGABRT.

    Attributes:
        ended: The process ends.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._working = self._waiting = self._held_back = self._first = 0
        self._captures = False
        self.ended = False

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Work, beside others."""
        with self._changed:
            self._held_back += 1
            try:
                self._wait(lambda: not self._captures and (self._first > 0 or not self._waiting))
            finally:
                self._held_back -= 1
                self._first = min(max(0, self._first - 1), self._held_back)
                self._changed.notify_all()
            self._working += not self._is_over()
        self._stay()
        try:
            yield
        finally:
            with self._changed:
                self._working -= 1
                self._changed.notify_all()
            self._stay()

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """Capture, alone."""
        with self._changed:
            self._waiting += 1
            try:
                self._wait(lambda: not self._working and not self._captures and (self.ended or not self._first))
            finally:  # Ctrl-C ends the waiting too
                self._waiting -= 1
                self._changed.notify_all()
            self._captures = self._captures or not self._is_over()
        self._stay()
        try:
            yield
        finally:
            with self._changed:
                self._captures = False
                self._first = self._held_back
                self._changed.notify_all()
            self._stay()

    def _wait(self, until: Callable[[], bool]) -> None:
        self._changed.wait_for(lambda: self._is_over() or until())

    def _is_over(self) -> bool:
        """Whether the process ends, and this is one of the threads that may do no more."""
        thread = threading.current_thread()
        return self.ended and thread is not threading.main_thread() and not isinstance(thread, OwnThread)

    def _stay(self) -> None:
        if self._is_over():
            stay()

    def end(self) -> None:
        """Give threads no more turns, but for the main one and those of this package, and wait for their last."""
        with self._changed:
            self.ended = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._working and not self._captures, LAST_SECONDS)


TURNS = Turns()
atexit.register(TURNS.end)


class Native:
    """What a runtime has on the GPU. When nobody holds this any more it is freed: later, in a turn and a thread for it.

    So it may be let go anywhere, amid a capture and in finalizers too. To free something on the GPU there would spoil
    the capture, and to destroy a graph that ONNX Runtime captured ends the process
    (https://github.com/microsoft/onnxruntime/pull/32081).

    Args:
        things: By name, by which they are attributes of this. Nobody else may hold them, but while using them; and they
            must not lead back to this.
    """

    def __init__(self, **things: Any) -> None:
        self._things = things
        weakref.finalize(self, frees().give, functools.partial(_free, things)).atexit = False

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_things"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __setitem__(self, name: str, thing: Any) -> None:
        self._things[name] = thing

    def get(self, name: str) -> Any:
        return self._things.get(name)


def _free(things: dict[str, Any]) -> None:
    with TURNS.working():
        things.clear()


_MAKING = threading.Lock()
_frees: OwnThread | None = None


def frees() -> OwnThread:
    """The thread that waits for a turn to free what nobody holds any more."""
    global _frees
    with _MAKING:
        if _frees is None:
            _frees = OwnThread("planish-frees")
        return _frees


@contextlib.contextmanager
def opening() -> Iterator[None]:
    """Work, when what was let go before is free: there is room for what is opened."""
    for _ in range(LONGEST_CHAIN):
        frees().do(lambda: None)
    with TURNS.working():
        yield


def _forked() -> None:
    """In the child there are no other threads."""
    global _frees, _MAKING
    _frees, _MAKING = None, threading.Lock()
    TURNS.__init__()  # type: ignore[misc]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
