"""Works of one run side by side: each in a thread, which does little more than wait for its jobs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from pipelines.processes import terminable

T = TypeVar("T")

MOST_LANES = 4
MEMORY_SHARE = 0.5
_WEIGHTS_HELD = 8  # how often a stage may hold the weights: FP64, packed, as bytes of a file
_BESIDE_BYTES = 1_500_000_000  # what a process holds beside them: the libraries, activations
_LEAVE_SECONDS = 10.0


def lanes_for(weights_bytes: int, cores: int) -> int:
    """How many stages may run side by side: of a large model one, so that memory suffices as it would for each alone.

    Args:
        weights_bytes: Size of the model's weights.
        cores: Processors that the run may use.
    """
    import psutil

    each = _WEIGHTS_HELD * weights_bytes + _BESIDE_BYTES
    return max(1, min(MOST_LANES, cores, int(MEMORY_SHARE * psutil.virtual_memory().available / each)))


def side_by_side(works: Sequence[Callable[[], T]], lanes: int, stop: threading.Event) -> list[T]:
    """Do independent works, up to `lanes` of them at a time, begun in their order.

    Where one raises, or this thread is interrupted, no further work begins, `stop` is set so that the jobs of the
    others end, and the error is raised when they have.

    Args:
        works: What to do; each is called in one thread from begin to end (see `pipelines.processes.Child`).
        lanes: With one lane everything happens in the caller's own thread.
        stop: Watched by the works' jobs (`pipelines.processes.run_job`).

    Returns:
        What the works returned, in their order.
    """
    if lanes <= 1 or len(works) <= 1:
        return [work() for work in works]
    results: dict[int, T] = {}
    failed: list[BaseException] = []
    waiting = iter(list(enumerate(works)))
    lock = threading.Lock()

    def lane() -> None:
        while not stop.is_set():
            with lock:
                number, work = next(waiting, (-1, None))
            if work is None:
                return
            try:
                results[number] = work()
            except BaseException as error:
                failed.append(error)  # the first is the cause of the others
                stop.set()

    # Daemons: one that waits for the lock of another run, which nothing wakes, must not hold up an interrupted one.
    threads = [threading.Thread(target=lane, daemon=True) for _ in range(min(lanes, len(works)))]
    with terminable():
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException:
            stop.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join(_LEAVE_SECONDS)
            raise
    if failed:
        raise failed[0]
    return [results[number] for number in range(len(works))]
