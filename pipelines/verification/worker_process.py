"""The parent's side of a worker: what it opens, and the process that is stopped except while it is asked something."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.errors import PlanishError
from pipelines.processes import Child

FINISH_SECONDS = 60.0
_LOOK_SECONDS = 0.05
# torch.compile's pool of processes would be a session of its own, which goes on while its worker is stopped. Only
# Triton's kernels are compiled there: those for processors are in threads of the worker's own.
_ENVIRONMENT = {"TORCH_WARM_POOL": "0"}


@dataclass(frozen=True)
class WorkerSpec:
    """What one worker opens.

    Attributes:
        name: The variant's id, or the name of a baseline.
        opener: ``"module:function"``, called in the worker as ``opener(arguments, threads=n)``; returns a `Session`.
            `pipelines.opening:open_variant` opens what targets build, `exporter.targets.pytorch:open_eager` and
            `open_compiled` the baselines.
        arguments: A JSON-able dict.
        threads: Compute threads.
        files: What the session reads, for its size.
        estimated_bytes: Memory that the worker will hold, as far as is known (see `Plan.concurrent_bytes`).
        env: Environment variables for the worker.
        is_baseline: It is no variant: others are compared with it.
    """

    name: str
    opener: str
    arguments: dict[str, Any]
    threads: int
    files: tuple[Path, ...] = ()
    estimated_bytes: int = 0
    env: dict[str, str] = field(default_factory=dict)
    is_baseline: bool = False


@dataclass
class WorkerState:
    """What is known of a worker beyond its durations; it outlives the worker's process.

    Attributes:
        error: Why the worker has failed, or ``None``.
        ready: Its ``ready`` message.
        peak_rss_bytes: Peak resident memory, once it has finished.
        device: What it saw of its GPU, once it has finished; empty without one.
    """

    error: str | None = None
    ready: dict[str, Any] = field(default_factory=dict)
    peak_rss_bytes: int | None = None
    device: dict[str, Any] = field(default_factory=dict)


class WorkerProcess:
    """One worker process. It fails alone: what goes wrong is kept in `state.error`, and it is killed."""

    def __init__(
        self, spec: WorkerSpec, state: WorkerState, points: Mapping[str, Path], log: Path, *, sparing: bool = False
    ) -> None:
        self.spec = spec
        self.state = state
        self._started = time.monotonic()
        arguments = {
            "opener": spec.opener,
            "arguments": spec.arguments,
            "threads": spec.threads,
            "points": {label: str(path) for label, path in points.items()},
            "sparing": sparing,
        }
        env = {**_ENVIRONMENT, "TORCHINDUCTOR_COMPILE_THREADS": str(spec.threads), **spec.env}
        self._child = Child("pipelines.verification.worker:serve", arguments, log=log, threads=spec.threads, env=env)

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self._child.kill()

    def block(self, label: str, mode: str, min_seconds: float, timeout_s: float) -> dict[str, Any] | None:
        """Have it time one block; ``None`` when it has failed. See `pipelines.verification.worker.time_block`."""
        command = {"do": "block", "point": label, "mode": mode, "min_seconds": min_seconds}
        return self._ask(command, "block", timeout_s)

    def finish(self) -> None:
        """Ask for its peak memory; it ends thereafter."""
        if (last := self._ask({"do": "finish"}, "finished", FINISH_SECONDS)) is not None:
            self.state.peak_rss_bytes = max(self.state.peak_rss_bytes or 0, last["peak_rss_bytes"])
            self.state.device = last["device"]
            self._child.kill()

    def cpu_seconds(self) -> float:
        """Processor time that it has used so far; 0 once it has failed or ended."""
        import psutil

        try:
            times = psutil.Process(self._child.pid).cpu_times()
        except psutil.Error:
            return 0.0
        return times.user + times.system

    def is_ready(self, timeout_s: float) -> bool:
        """Look for a moment whether it is ready, or has failed, or took longer than `timeout_s` since its start."""
        try:
            content = self._expect("ready", _LOOK_SECONDS)
        except TimeoutError:
            if time.monotonic() - self._started > timeout_s:
                self._fail(f"it was not ready within {timeout_s:g} s")
            return self.state.error is not None
        if content is not None:
            self.state.ready = content
            self._child.suspend()
        return True

    def _ask(self, command: dict[str, Any], wanted: str, timeout_s: float) -> dict[str, Any] | None:
        if self.state.error is not None:
            return None
        self._child.resume()
        self._child.send(command)
        try:
            answer = self._expect(wanted, timeout_s)
        except TimeoutError:
            self._fail(f"it gave no answer within {timeout_s:g} s")
            return None
        if answer is not None:
            self._child.suspend()
        return answer

    def _expect(self, wanted: str, timeout_s: float) -> dict[str, Any] | None:
        end = time.monotonic() + timeout_s
        try:
            while True:
                kind, content = self._child.receive(max(0.0, end - time.monotonic()))
                if kind == wanted:
                    return content
        except PlanishError as error:
            self._fail(str(error))
            return None

    def _fail(self, reason: str) -> None:
        self.state.error = reason
        self._child.kill()


def await_ready(workers: Iterable[WorkerProcess], timeout_s: float, say: Callable[[str], None]) -> None:
    """Wait until each worker is ready, and stopped, or has failed; says all the while which are not."""
    waiting = list(workers)
    while waiting:
        say(f"opening {', '.join(worker.spec.name for worker in waiting)}")
        waiting = [worker for worker in waiting if not worker.is_ready(timeout_s)]
