"""Threads of a process that work on the GPU, and those that capture: no GPU is needed to take turns."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from exporter.targets.cuda import Turns


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
