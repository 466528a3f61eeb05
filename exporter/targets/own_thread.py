"""A thread that belongs to one object: what has to be done, and to be destroyed, in one thread alone."""

from __future__ import annotations

import atexit
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")

Work = SimpleQueue[tuple[Callable[[], Any], Future[Any] | None] | None]


class OwnThread(threading.Thread):
    """A thread that does what it is given, one after the other. It ends with `stop`, or with the process.

    The process does not end in the middle of what it does: native code that comes back to an interpreter which is gone
    ends the process with SIGABRT. So what it was given is done first (Ctrl-C ends the waiting in `do`, not the work),
    and daemon threads, which go on until the end, have nothing more done: they stay in `do`.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._work: Work = SimpleQueue()
        self._stopped = False
        with _GIVING:
            _ALIVE.add(self)
        self.start()

    def do(self, call: Callable[[], T]) -> T:
        """Have something done, and wait for what comes of it.

        Raises:
            RuntimeError: The thread was stopped, or the interpreter is gone.
        """
        if threading.current_thread() is self:
            return call()
        done: Future[T] = Future()
        with _GIVING:
            if self._stopped or sys.is_finalizing():
                raise RuntimeError(f"{self.name} has ended")
            late = _ENDING.is_set() and threading.current_thread() is not threading.main_thread()
            if not late:
                self._work.put((call, done))
        if late:
            stay()
        try:
            return done.result()
        finally:
            del done  # with an error in it, it would hold this frame, which holds it

    def give(self, call: Callable[[], object]) -> None:
        """Have something done, without waiting.

        Safe in finalizers: the collector of garbage runs in the middle of anything, with any lock held, and the queue's
        `put` is the one of its kind that allows for that.
        """
        self._work.put((call, None))

    def stop(self) -> None:
        """Let it end when all is done that it was given; nothing can be done afterwards. Safe in finalizers."""
        self._stopped = True
        self._work.put(None)

    def settle(self) -> None:
        """Wait until it has done what it was given so far, or has stopped."""
        done: Future[None] = Future()
        self._work.put((lambda: None, done))
        while self.is_alive() and not wait([done], timeout=0.1).done:
            pass

    def run(self) -> None:
        while (item := self._work.get()) is not None:
            _do(*item)
            del item  # or what it holds would be held until the next comes


def stay() -> None:
    """Wait until the process is gone, as daemon threads may: to come back would be to go on, or to let something go."""
    threading.Event().wait()


_ALIVE: weakref.WeakSet[OwnThread] = weakref.WeakSet()
_GIVING, _ENDING = threading.Lock(), threading.Event()


@atexit.register
def _end() -> None:
    with _GIVING:
        _ENDING.set()
        alive = list(_ALIVE)
    for thread in alive:
        thread.settle()


def _do(call: Callable[[], Any], done: Future[Any] | None) -> None:
    try:
        result = call()
    except BaseException as error:
        if done is not None:
            done.set_exception(error)
    else:
        if done is not None:
            done.set_result(result)
    finally:
        del call, done  # what an error's traceback leads to
