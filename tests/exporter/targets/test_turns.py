"""Threads of a process that work on the GPU, and those that capture: no GPU is needed to take turns."""

from __future__ import annotations

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from exporter.targets.turns import TURNS, Turns, free_in_turn


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


@pytest.mark.parametrize("lets_go", ["owner", "close"])
def test_what_nobody_holds_any_more_is_freed_in_a_turn(lets_go: str) -> None:
    """The GPU is pretended: to free something there amid a capture would spoil that."""
    freed: list[tuple[str, int]] = []
    done = threading.Event()

    class OnTheGpu:
        def __del__(self) -> None:
            freed.append((threading.current_thread().name, TURNS._working))
            done.set()

    class Owner:
        def __init__(self) -> None:
            self.held = [OnTheGpu()]
            free_in_turn(self, self.held)

    owner = Owner()
    if lets_go == "close":
        owner.held.clear()
        assert freed == [(threading.current_thread().name, 0)]
        del owner
        gc.collect()
        assert len(freed) == 1
        return
    with TURNS.capturing():
        del owner
        gc.collect()
        assert not done.wait(0.3)
    assert done.wait(60)
    assert freed == [("planish-frees", 1)]
