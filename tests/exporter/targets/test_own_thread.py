"""A thread of an object's own."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import pytest

from exporter.targets.own_thread import OwnThread


def test_everything_is_done_in_one_thread_in_order_and_errors_come_back() -> None:
    mine, seen = OwnThread("planish-test"), []

    def work(number: int) -> Any:
        seen.append((number, threading.current_thread().name))
        return number

    assert [mine.run(lambda number=number: work(number)) for number in range(3)] == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        mine.run(lambda: 1 // 0)
    with pytest.raises(SystemExit):
        mine.run(lambda: (_ for _ in ()).throw(SystemExit))
    assert mine.run(threading.current_thread).is_alive()
    assert seen == [(number, "planish-test") for number in range(3)]


def test_it_ends_after_the_last_thing_it_is_given() -> None:
    mine, done = OwnThread("planish-test"), threading.Event()
    thread = mine.run(threading.current_thread)
    mine.stop(done.set)
    assert done.wait(60)
    thread.join(60)
    assert not thread.is_alive()


def test_it_holds_nothing_of_what_it_has_done() -> None:
    class Large:
        pass

    mine, large = OwnThread("planish-test"), Large()
    seen = weakref.ref(large)
    assert mine.run(lambda held=large: held) is large
    del large
    mine.run(lambda: None)
    assert seen() is None
