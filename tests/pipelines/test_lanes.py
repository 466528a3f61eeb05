"""Works side by side."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from exporter.errors import RequestError
from pipelines.lanes import lanes_for, side_by_side
from pipelines.processes import Stopped, run_job

JOBS = "tests.pipelines.processes.jobs_to_run"


def test_results_come_in_the_order_of_the_works() -> None:
    met = threading.Barrier(2, timeout=30)

    def work(number: int) -> int:
        if number < 2:
            met.wait()  # both run at the same time, or nobody passes
            time.sleep(0.05 * (1 - number))
        return number

    works = [lambda number=number: work(number) for number in range(5)]
    assert side_by_side(works, 2, threading.Event()) == [0, 1, 2, 3, 4]


def test_with_one_lane_all_is_done_in_the_callers_thread() -> None:
    threads: list[int] = []
    side_by_side([lambda: threads.append(threading.get_ident())] * 3, 1, threading.Event())
    assert threads == [threading.get_ident()] * 3


def test_an_error_ends_the_jobs_of_the_others_and_is_the_one_that_is_raised(tmp_path: Path) -> None:
    stop, begun, after = threading.Event(), threading.Event(), []
    seen: list[BaseException] = []

    def long() -> None:
        try:
            run_job(f"{JOBS}:sleep", {"seconds": 600}, log=tmp_path / "log", on_line=lambda _: begun.set(), stop=stop)
        except BaseException as error:
            seen.append(error)
            raise

    def failing() -> None:
        begun.wait(60)
        raise RequestError("the key is unknown", "epohcs", "Did you mean epochs?")

    started = time.monotonic()
    with pytest.raises(RequestError, match="epohcs"):
        side_by_side([long, failing, lambda: after.append(1)], 2, stop)
    assert isinstance(seen[0], Stopped)
    assert after == []
    assert time.monotonic() - started < 300  # far from the job's 600 s


def test_a_large_model_gets_one_lane() -> None:
    assert lanes_for(90_000_000, 1) == 1
    assert lanes_for(1 << 50, 64) == 1
    assert 1 <= lanes_for(0, 64) <= 4
