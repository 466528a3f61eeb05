"""A thread that belongs to one object: what has to be done, and to be destroyed, in one thread alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")

Work = SimpleQueue[tuple[Callable[[], Any], Future[Any] | None] | None]


class OwnThread:
    """A thread that does what it is given, one after the other. It ends with `stop`, or with the process.

    Whoever gives it something after `stop` waits for ever: stop it when nobody is left who could.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str) -> None:
        self._work: Work = SimpleQueue()
        threading.Thread(target=_serve, args=(self._work,), name=name, daemon=True).start()

    def run(self, call: Callable[[], T]) -> T:
        """Have something done, and wait for what comes of it."""
        done: Future[T] = Future()
        self._work.put((call, done))
        return done.result()

    def stop(self, last: Callable[[], object]) -> None:
        """Have something done at last, without waiting; nothing can be done afterwards.

        Safe in finalizers: the collector of garbage runs in the middle of anything, with any lock held, and the queue's
        `put` is the one of its kind that allows for that.
        """
        self._work.put((last, None))
        self._work.put(None)


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
