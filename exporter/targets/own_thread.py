"""A thread that belongs to one object: what has to be done, and to be destroyed, in one thread alone."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")

Work = SimpleQueue[tuple[Callable[[], Any], Future[Any] | None] | None]


class OwnThread:
    """A thread that does what it is given, one after the other. It ends with `stop`, or with the process.

    Whoever gives it something after `stop` waits for ever: stop it when nobody is left who could.

    The process does not end in the middle of what it does: native code that comes back to an interpreter which is gone
    ends the process with SIGABRT. So what it was given is done first (Ctrl-C ends the waiting in `run`, not the work),
    and daemon threads, which go on until the end, have nothing more done: they wait in `run` until they are gone.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str) -> None:
        self._work: Work = SimpleQueue()
        self._thread = threading.Thread(target=_serve, args=(self._work,), name=name, daemon=True)
        self._thread.start()
        _ALIVE.add(self)

    def run(self, call: Callable[[], T]) -> T:
        """Have something done, and wait for what comes of it."""
        done: Future[T] = Future()
        with _GIVING:
            if not _ENDING.is_set() or threading.current_thread() is threading.main_thread():
                self._work.put((call, done))
        return done.result()

    def give(self, call: Callable[[], object]) -> None:
        """Have something done, without waiting.

        Safe in finalizers: the collector of garbage runs in the middle of anything, with any lock held, and the queue's
        `put` is the one of its kind that allows for that.
        """
        self._work.put((call, None))

    def stop(self) -> None:
        """Let it end when all is done that it was given; nothing can be done afterwards. Safe in finalizers."""
        self._work.put(None)

    def settle(self) -> None:
        """Wait until it has done what it was given so far, or has stopped."""
        done: Future[None] = Future()
        self._work.put((lambda: None, done))
        while self._thread.is_alive() and not wait([done], timeout=0.1).done:
            pass


_ALIVE: weakref.WeakSet[OwnThread] = weakref.WeakSet()
_GIVING, _ENDING = threading.Lock(), threading.Event()


@atexit.register
def _end() -> None:
    with _GIVING:
        _ENDING.set()
    for thread in list(_ALIVE):
        thread.settle()


def _serve(work: Work) -> None:
    while (item := work.get()) is not None:
        _do(*item)
        del item  # or what it holds would be held until the next comes


def _do(call: Callable[[], Any], done: Future[Any] | None) -> None:
    try:
        result = call()
    except BaseException as error:
        if done is not None:
            done.set_exception(error)
        return
    if done is not None:
        done.set_result(result)
