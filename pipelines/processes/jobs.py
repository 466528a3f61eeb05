"""Run one function in a process of its own and wait for its result."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import InternalError
from pipelines.processes import tree
from pipelines.processes.child import Child
from pipelines.processes.failures import see


@dataclass(frozen=True)
class JobResult:
    """What a job returned, and what it took.

    Attributes:
        value: The function's return value, through JSON.
        seconds: Wall time from start to end of the process, its start-up included.
        peak_rss_bytes: Peak resident memory of the job's own process (a compiler that it called is not in it).
    """

    value: Any
    seconds: float
    peak_rss_bytes: int


def run_job(
    function: str,
    arguments: dict[str, Any],
    *,
    log: Path,
    env: dict[str, str] | None = None,
    threads: int | None = None,
    memory_limit_bytes: int | None = None,
    timeout_s: float | None = None,
    on_line: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
) -> JobResult:
    """Call `function` with `arguments` in a child process and return what it returned.

    Everything that the child and native code print goes to the log. The child and its descendants are gone when this
    returns or raises, and they go when this process is killed; Ctrl-C kills them at once and raises
    `KeyboardInterrupt`.

    Args:
        function: ``"module:name"`` of a function that takes one JSON dict and returns something JSON-able.
        arguments: The dict.
        log: The log file to append to.
        env: Environment variables on top of this process's own.
        threads: Threads for OpenMP and BLAS pools, through the environment.
        memory_limit_bytes: Limit on the child's private memory; beyond it allocations fail.
        timeout_s: Give up after so many seconds without any message from the child.
        on_line: Called with each text that the job gives to `report_progress`.
        stop: Set by another thread, it ends the job.

    Raises:
        PlanishError: As the function raised it; `EnvironmentLackError` for a lack of disk space or memory;
            `InternalError`, naming the log, for any other exception, a crash or a time-out.
        Stopped: `stop` was set.
    """
    start = time.monotonic()
    with (
        tree.terminable(),
        Child(function, arguments, log=log, env=env, threads=threads, memory_limit_bytes=memory_limit_bytes) as child,
    ):
        while True:
            try:
                kind, content = child.receive(timeout_s, stop)
            except TimeoutError:
                raise InternalError(f"{function} gave no sign of life", f"{timeout_s} s", see(log)) from None
            if kind == "result":
                child.wait(5.0)  # let it flush its log; what hangs at exit is killed
                return JobResult(content["value"], time.monotonic() - start, content["peak_rss_bytes"])
            if kind == "progress" and on_line is not None:
                on_line(content)
