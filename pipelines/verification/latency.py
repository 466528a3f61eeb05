"""Latency as a paired ratio: every variant in a process of its own, one running at a time, in random order.

Workers that are not being timed are stopped (SIGSTOP): a runtime's idle threads spin for a while, and would take
processor time from the one that is being timed. A round visits every worker at every point, so that a ratio is
always between durations that are a second or so apart, and drifts of the machine cancel.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from exporter.errors import RequestError
from exporter.hardware import affinity
from pipelines.baselines import EAGER, PYTORCH
from pipelines.processes import terminable
from pipelines.verification.latency_result import LatencyResult, PointTiming, Samples, WorkerTiming, time_point
from pipelines.verification.worker_process import WorkerProcess, WorkerSpec, WorkerState, await_ready

MEMORY_SHARE = 0.7
MOST_CONCURRENT_BYTES = 16_000_000_000
BUSY_SHARE = 0.1
ROUNDS_FOR_AN_INTERVAL = 5


@dataclass(frozen=True)
class Plan:
    """How a measurement is done; the defaults suit a model of some milliseconds.

    Attributes:
        rounds: At most so many.
        min_rounds: At least so many, whatever the budget: fewer than five carry no 95 % interval.
        budget_s: Time for the rounds (opening the sessions comes on top).
        min_block_ms: A block repeats the run for at least so long.
        host_rounds: Rounds that also time `session.run(dict)`.
        seed: Of the order of workers and the bootstrap.
        open_timeout_s: A worker that is not ready after so long has failed.
        block_timeout_s: A block that takes longer has failed.
        concurrent_bytes: Workers are alive at the same time only up to this sum of `estimated_bytes`; beyond it they
            are measured in groups, each with the baseline. ``None``: 70 % of the memory now available, and 16 GB at
            most: also a machine with much memory need not hold every form of a large model at once.
    """

    rounds: int = 30
    min_rounds: int = ROUNDS_FOR_AN_INTERVAL
    budget_s: float = 45.0
    min_block_ms: float = 50.0
    host_rounds: int = 3
    seed: int = 0
    open_timeout_s: float = 1800.0
    block_timeout_s: float = 300.0
    concurrent_bytes: int | None = None


def measure(
    workers: Sequence[WorkerSpec],
    points: Mapping[str, Path],
    *,
    log: Path,
    plan: Plan | None = None,
    baseline: str = EAGER,
    best_of: Sequence[str] = PYTORCH,
    on_line: Callable[[str], None] | None = None,
) -> LatencyResult:
    """Measure `workers` at `points`.

    A worker that crashes, hangs or cannot open its session gets an `error` and no figures; the others go on.

    Args:
        workers: The variants and the baselines.
        points: By label (``"1x16"``), the ``.safetensors`` or ``.npz`` file of the inputs.
        log: Where the workers' output goes.
        plan: How to measure.
        baseline: Name of the worker that speed-ups are against; without it among `workers` there are none.
        best_of: Names of the PyTorch baselines, of which the fastest at each point is the second reference.
        on_line: Called with a few words on what is happening.

    Raises:
        RequestError: No worker, no point, or two workers of one name.
    """
    plan = plan or Plan()
    names = [spec.name for spec in workers]
    if not workers or not points:
        raise RequestError("there is nothing to measure", f"{len(workers)} workers, {len(points)} points")
    if len(set(names)) != len(names):
        raise RequestError("two workers have the same name", ", ".join(names))
    start = time.monotonic()
    groups = plan_groups(workers, baseline, plan.concurrent_bytes)
    samples = {name: Samples() for name in names}
    states = {name: WorkerState() for name in names}
    with terminable():
        done = [
            _Group(number, groups, points, samples, states, log, plan, on_line).measure()
            for number in range(len(groups))
        ]
    rounds, busy = min(n for n, _ in done), max(share for _, share in done)
    for name, state in states.items():
        if state.error is not None:  # what it did before it crashed is not to be ranked
            del samples[name]
    timings: dict[str, WorkerTiming] = {}
    for spec in workers:
        found: dict[str, PointTiming] = {}
        if spec.name in samples:
            for label in points:
                found[label] = time_point(samples, spec.name, label, baseline=baseline, best_of=best_of, seed=plan.seed)
        timings[spec.name] = _timing(spec, states[spec.name], found)
    return LatencyResult(
        workers=timings,
        baseline=baseline,
        baselines=tuple(spec.name for spec in workers if spec.is_baseline),
        points=tuple(points),
        rounds=rounds,
        min_block_ms=plan.min_block_ms,
        seed=plan.seed,
        seconds=time.monotonic() - start,
        busy_elsewhere=busy,
        notes=tuple(_notes(len(groups), rounds, busy, timings, baseline)),
    )


def plan_groups(workers: Sequence[WorkerSpec], baseline: str, concurrent_bytes: int | None) -> list[list[WorkerSpec]]:
    """Divide workers into groups that fit the memory: the baseline in each of them, and at least one other."""
    if concurrent_bytes is None:
        import psutil

        concurrent_bytes = min(MOST_CONCURRENT_BYTES, int(MEMORY_SHARE * psutil.virtual_memory().available))
    if sum(spec.estimated_bytes for spec in workers) <= concurrent_bytes:
        return [list(workers)]
    common = [spec for spec in workers if spec.name == baseline]
    groups: list[list[WorkerSpec]] = []
    held = 0
    for spec in workers:
        if spec in common:
            continue
        if not groups or held + spec.estimated_bytes > concurrent_bytes:
            groups.append(list(common))
            held = sum(other.estimated_bytes for other in common)
        groups[-1].append(spec)
        held += spec.estimated_bytes
    return groups or [common]


class _Group:
    """Workers that are alive at the same time: opened, timed round after round, ended."""

    def __init__(
        self,
        number: int,
        groups: Sequence[Sequence[WorkerSpec]],
        points: Mapping[str, Path],
        samples: dict[str, Samples],
        states: dict[str, WorkerState],
        log: Path,
        plan: Plan,
        on_line: Callable[[str], None] | None,
    ) -> None:
        self.number = number
        self.specs = groups[number]
        self.groups = len(groups)
        self.points = points
        self.samples = samples
        self.states = states
        self.log = log
        self.plan = plan
        self.say = on_line or (lambda text: None)

    def measure(self) -> tuple[int, float]:
        """Returns the number of rounds, and the share of the processors' time that went elsewhere meanwhile."""
        sparing = self.groups > 1
        with contextlib.ExitStack() as stack:
            workers: list[WorkerProcess] = []
            # The baseline comes last: a runtime needs most memory while it loads, PyTorch no more than afterwards.
            for spec in reversed(self.specs) if sparing else self.specs:
                if self.states[spec.name].error is not None:  # the baseline, in an earlier group
                    continue
                worker = WorkerProcess(spec, self.states[spec.name], self.points, self.log, sparing=sparing)
                workers.append(stack.enter_context(worker))
                if sparing:  # one after the other: while it loads a model needs more than afterwards
                    await_ready([worker], self.plan.open_timeout_s, self.say)
            await_ready([] if sparing else workers, self.plan.open_timeout_s, self.say)
            used = _used_seconds(workers)
            rounds = self._rounds(workers)
            ours, all_used, capacity = (
                after - before for before, after in zip(used, _used_seconds(workers), strict=True)
            )
            for worker in workers:
                worker.finish()
        return rounds, min(1.0, max(0.0, all_used - ours) / capacity) if capacity > 0 else 0.0

    def _rounds(self, workers: Sequence[WorkerProcess]) -> int:
        order = random.Random(f"{self.plan.seed} {self.number}")
        budget_s = self.plan.budget_s / self.groups
        start = time.monotonic()
        done = 0
        while done < self.plan.rounds and any(worker.state.error is None for worker in workers):
            elapsed = time.monotonic() - start
            if done >= self.plan.min_rounds and elapsed + elapsed / done > budget_s:
                break
            self.say(f"timing {len(workers)} sessions, round {done + 1}, {elapsed:.0f} s so far")
            for mode in ("binding", "host") if done < self.plan.host_rounds else ("binding",):
                for label in self.points:
                    for worker in order.sample(list(workers), len(workers)):
                        self._block(worker, label, mode, done)
            done += 1
        return done

    def _block(self, worker: WorkerProcess, label: str, mode: str, done: int) -> None:
        block = worker.block(label, mode, self.plan.min_block_ms / 1e3, self.plan.block_timeout_s)
        if block is not None:
            key = (self.number, done)
            self.samples[worker.spec.name].add(label, mode, key, block["times_ns"], block["energy_j"])


def _used_seconds(workers: Sequence[WorkerProcess]) -> tuple[float, float, float]:
    """Processor seconds so far: of the workers, of everything that ran on their processors, and with idleness.

    What runs on processors that the workers may not use does not disturb them.
    """
    import psutil

    each = psutil.cpu_times(percpu=True)
    mine = [each[i] for i in affinity() if i < len(each)] or each
    # Times of guests are within those of user and nice.
    capacity = sum(sum(t) - getattr(t, "guest", 0.0) - getattr(t, "guest_nice", 0.0) for t in mine)
    idle = sum(t.idle + getattr(t, "iowait", 0.0) for t in mine)
    return sum(worker.cpu_seconds() for worker in workers), capacity - idle, capacity


def _timing(spec: WorkerSpec, state: WorkerState, points: dict[str, PointTiming]) -> WorkerTiming:
    if state.device:  # the GPU's energy, instead of the processor's
        seen = state.device["points"]
        points = {label: replace(point, energy_j=seen[label]["energy_j"]) for label, point in points.items()}
    energies = [point.energy_j for point in points.values() if point.energy_j is not None]
    return WorkerTiming(
        name=spec.name,
        error=state.error,
        executed=state.ready.get("executed", {}),
        points=points,
        threads=spec.threads,
        affinity=tuple(state.ready.get("affinity", ())),
        peak_rss_bytes=state.peak_rss_bytes,
        file_bytes=_size(spec.files),
        energy_j=float(np.mean(energies)) if energies else None,
        energy_reason="" if energies else _no_energy(state),
        device=state.device,
    )


def _no_energy(state: WorkerState) -> str:
    if state.device:
        return str(state.device["reason"] or "the GPU shows no energy counter")
    return str(state.ready.get("energy_reason") or "it was not measured")


def _size(files: Sequence[Path]) -> int | None:
    """Bytes of `files` together; ``None`` where there are none, or not all of them (their worker says so)."""
    if not files or not all(path.is_file() for path in files):
        return None
    return sum(path.stat().st_size for path in files)


def _notes(groups: int, rounds: int, busy: float, timings: Mapping[str, WorkerTiming], baseline: str) -> list[str]:
    notes = []
    if baseline not in timings:
        notes.append(f"There is no {baseline!r} worker, so there are no speed-ups.")
    elif timings[baseline].error is not None:
        notes.append(f"The baseline {baseline!r} failed, so there are no speed-ups: {timings[baseline].error}")
    if groups > 1:
        notes.append(
            f"Not all sessions fit into memory at once: they were measured in {groups} groups, each with the baseline "
            "in it, and ratios between sessions of different groups go through the baseline."
        )
    if rounds < ROUNDS_FOR_AN_INTERVAL:
        notes.append(f"Only {rounds} rounds were measured: the intervals cover less than 95 %.")
    if busy > BUSY_SHARE:
        notes.append(f"Other processes took {busy:.0%} of the processor time meanwhile: the intervals are wide for it.")
    return notes
