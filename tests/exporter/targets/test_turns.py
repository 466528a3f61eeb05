"""Threads of a process that work on the GPU, and those that capture: no GPU is needed to take turns."""

from __future__ import annotations

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from exporter.targets.turns import TURNS, Native, Turns, frees, opening


def test_who_captures_is_alone_and_all_come_to_an_end() -> None:
    turns, inside, wrong = Turns(), [0, 0], []
    guard = threading.Lock()
    most = 0

    def work(number: int) -> None:
        nonlocal most
        captures = number % 5 == 0
        for _ in range(40):
            with turns.capturing() if captures else turns.working():
                with guard:
                    inside[captures] += 1
                    most = max(most, inside[0])
                    if inside[1] > 1 or (inside[1] and inside[0]):
                        wrong.append(tuple(inside))
                time.sleep(0.0002)
                with guard:
                    inside[captures] -= 1

    with ThreadPoolExecutor(10) as pool:
        for job in [pool.submit(work, number) for number in range(10)]:
            job.result(timeout=60)
    assert not wrong
    assert most > 1, "those who work do so beside each other"


def test_who_waits_to_capture_is_not_kept_waiting_by_who_comes_later() -> None:
    turns, order = Turns(), []
    started = threading.Event()

    def capture() -> None:
        started.set()
        with turns.capturing():
            order.append("capture")

    def later() -> None:
        with turns.working():
            order.append("work")

    with turns.working():
        first = threading.Thread(target=capture)
        first.start()
        started.wait()
        while not turns._waiting:
            time.sleep(0.001)
        second = threading.Thread(target=later)
        second.start()
        time.sleep(0.02)
        assert order == []
    for thread in (first, second):
        thread.join(timeout=60)
    assert order == ["capture", "work"]


@pytest.mark.parametrize("kind", ["working", "capturing"])
def test_an_error_ends_a_turn(kind: str) -> None:
    turns = Turns()
    with pytest.raises(ValueError, match="inside"), getattr(turns, kind)():
        raise ValueError("inside")
    with turns.capturing():
        pass
    with turns.working():
        pass


def test_who_is_interrupted_while_waiting_to_capture_holds_nobody_back() -> None:
    turns = Turns()
    interrupted, done = threading.Event(), threading.Event()

    def waits() -> None:
        def interrupt(_: object) -> None:
            interrupted.set()
            done.wait(60)
            raise KeyboardInterrupt

        turns._changed.wait_for = interrupt  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt), turns.capturing():
            pytest.fail("it is not its turn")

    with turns.working():
        waiting = threading.Thread(target=waits)
        waiting.start()
        assert interrupted.wait(60)
        done.set()
        waiting.join(60)
    del turns._changed.wait_for
    works = threading.Thread(target=turns.working().__enter__, daemon=True)
    works.start()
    works.join(60)
    assert not works.is_alive()


@pytest.mark.parametrize("cyclic", [False, True])
def test_what_nobody_holds_any_more_is_freed_in_a_turn(cyclic: bool) -> None:
    """The GPU is pretended: to free something there amid a capture would spoil that."""
    freed: list[tuple[str, int]] = []
    done = threading.Event()

    class OnTheGpu:
        def __del__(self) -> None:
            freed.append((threading.current_thread().name, TURNS._working))
            done.set()

    class Owner:
        def __init__(self) -> None:
            self.native = Native(thing=OnTheGpu())
            self.native["other"] = 1
            self.me = self if cyclic else None

    owner = Owner()
    assert isinstance(owner.native.thing, OnTheGpu)
    assert (owner.native.other, owner.native.get("none")) == (1, None)
    with pytest.raises(AttributeError, match="none"):
        _ = owner.native.none
    with TURNS.capturing():
        del owner
        gc.collect()
        assert not done.wait(0.3)
    assert done.wait(60)
    assert freed == [("planish-frees", 1)]


def test_who_captures_all_the_time_does_not_keep_others_from_working() -> None:
    turns, stop = Turns(), threading.Event()

    def captures() -> None:
        while not stop.is_set():
            with turns.capturing():
                time.sleep(0.001)

    capturing = [threading.Thread(target=captures) for _ in range(2)]
    for thread in capturing:
        thread.start()

    def works() -> None:
        for _ in range(50):
            with turns.working():
                pass

    working = [threading.Thread(target=works, daemon=True) for _ in range(3)]
    for thread in working:
        thread.start()
    for thread in working:
        thread.join(60)
    alive = [thread for thread in working if thread.is_alive()]
    stop.set()
    for thread in capturing:
        thread.join(60)
    assert not alive
    assert (turns._held_back, turns._first, turns._waiting, turns._working) == (0, 0, 0, 0)


def test_after_the_end_daemon_threads_get_no_turn_and_come_out_of_none() -> None:
    turns, counts = Turns(), [0, 0, 0]

    def works(number: int) -> None:
        while True:
            with turns.capturing() if number == 2 else turns.working():
                time.sleep(0.001)
            counts[number] += 1

    for number in range(3):
        threading.Thread(target=works, args=(number,), daemon=True).start()
    while min(counts) < 3:
        time.sleep(0.001)
    turns.end()
    before = list(counts)
    assert (turns._working, turns._captures) == (0, False)
    time.sleep(0.1)
    assert counts == before
    with turns.working():  # the main one may still close what it has
        pass
    with turns.capturing():
        pass


def test_what_was_let_go_before_is_free_when_something_is_opened() -> None:
    """As a session's bindings are, and the runtime's session that these hold."""
    freed: list[str] = []

    class OnTheGpu:
        def __init__(self, name: str) -> None:
            self.name = name

        def __del__(self) -> None:
            time.sleep(0.2)
            freed.append(self.name)

    class Session:
        def __init__(self) -> None:
            opened = Native(session=OnTheGpu("session"))
            self.bound: Native | None = Native(binding=OnTheGpu("binding"), opened=opened)

        def drop(self) -> None:
            self.bound = None

    session = Session()
    frees().give(session.drop)
    with opening():
        assert freed == ["binding", "session"]
