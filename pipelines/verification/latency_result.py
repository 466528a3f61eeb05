"""What a latency measurement found: timings per worker and point, and the ratios between workers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines.verification.statistics import Ratio, paired_ratio, ratio_through

BUSY = 0.25
"""Share of the processors' time that other programs took, from which on a timing tells nothing and is not kept."""
RoundKey = tuple[int, int]
"""Group and round: two durations are a pair when they have the same one."""
Rounds = Mapping[RoundKey, float]
"""The duration of each round's block, a median in milliseconds."""


def spoils(busy_elsewhere: float | None) -> bool:
    """Whether other programs took so much of the processors (0 to 1) that a timing tells nothing."""
    return busy_elsewhere is not None and busy_elsewhere > BUSY


@dataclass(frozen=True)
class PointTiming:
    """One worker at one operating point. Percentiles are over all runs, host ones included copying in and out.

    Attributes:
        p50_ms, p90_ms, p99_ms: Percentiles of ``binding.run()``.
        host_p50_ms: Median of ``session.run(dict)``, from host memory to host memory.
        runs: How many runs the percentiles rest on.
        speedup: Against the baseline; ``None`` where the baseline was not measured.
        speedup_vs_best_pytorch: Against the fastest of the PyTorch baselines at this point.
        best_pytorch: Which one that was.
        energy_j: Joules of the processor packages per run, or ``None`` (the worker says why).
        rounds: What the ratios rest on.
    """

    p50_ms: float
    p90_ms: float
    p99_ms: float
    host_p50_ms: float | None
    runs: int
    speedup: Ratio | None
    speedup_vs_best_pytorch: Ratio | None
    best_pytorch: str | None
    energy_j: float | None
    rounds: Rounds = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "p50_ms": self.p50_ms,
            "p90_ms": self.p90_ms,
            "p99_ms": self.p99_ms,
            "host_p50_ms": self.host_p50_ms,
            "runs": self.runs,
            "best_pytorch": self.best_pytorch,
            "energy_j": self.energy_j,
            "rounds_ms": {f"{group}.{number}": ms for (group, number), ms in sorted(self.rounds.items())},
        }
        for name, ratio in (("speedup", self.speedup), ("speedup_vs_best_pytorch", self.speedup_vs_best_pytorch)):
            data[name] = ratio.value if ratio else None
            data[f"{name}_low"] = ratio.low if ratio else None
            data[f"{name}_high"] = ratio.high if ratio else None
        return data


@dataclass(frozen=True)
class WorkerTiming:
    """One worker: a variant or a baseline.

    Attributes:
        error: Why there is no timing (it crashed, hung or could not be opened), or ``None``.
        executed: What the runtime says it ran (`Session.executed`).
        points: By the point's label.
        threads: Compute threads asked for.
        affinity: Processors that the worker may use.
        peak_rss_bytes: Peak resident memory of the worker's process, opening included.
        file_bytes: Size of the files that it opens, or ``None`` where it has none.
        energy_j: Mean over the points of joules per run, or ``None``.
        energy_reason: Why energy is unknown; empty when it is known.
        device: Of a GPU, empty without one: ``memory_bytes`` that the worker holds there and, by point, what it does
            when it is kept busy (`pipelines.verification.gpu_meter.observe`). Energy is then the GPU's.
    """

    name: str
    error: str | None = None
    executed: dict[str, Any] = field(default_factory=dict)
    points: dict[str, PointTiming] = field(default_factory=dict)
    threads: int = 0
    affinity: tuple[int, ...] = ()
    peak_rss_bytes: int | None = None
    file_bytes: int | None = None
    energy_j: float | None = None
    energy_reason: str = ""
    device: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "error": self.error,
            "executed": self.executed,
            "points": {label: point.to_dict() for label, point in self.points.items()},
            "threads": self.threads,
            "affinity": list(self.affinity),
            "peak_rss_bytes": self.peak_rss_bytes,
            "file_bytes": self.file_bytes,
            "energy_j": self.energy_j,
            "energy_reason": self.energy_reason,
            "device": self.device,
        }


@dataclass(frozen=True)
class LatencyResult:
    """A whole measurement.

    Attributes:
        workers: Every worker by name, baselines included.
        baseline: Name of the worker that speed-ups are against.
        baselines: Names of those that are no variants.
        points: Labels of the operating points.
        rounds: Rounds that every pair was measured in.
        min_block_ms: Shortest duration of a block.
        seed: Of the order of workers and of the bootstrap.
        seconds: Wall time of it all.
        busy_elsewhere: Share of the time of the processors that may be used (0 to 1) that went to other processes and
            to other virtual machines during the rounds. It widens the intervals.
        notes: What a reader of the figures has to know.
    """

    workers: dict[str, WorkerTiming]
    baseline: str
    baselines: tuple[str, ...]
    points: tuple[str, ...]
    rounds: int
    min_block_ms: float
    seed: int
    seconds: float
    busy_elsewhere: float
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As ``evidence/latency.json`` has it."""
        workers = {name: worker.to_dict() for name, worker in self.workers.items()}
        return {
            "points": list(self.points),
            "rounds": self.rounds,
            "min_block_ms": self.min_block_ms,
            "seed": self.seed,
            "seconds": self.seconds,
            "busy_elsewhere": self.busy_elsewhere,
            "threads": max((w.threads for w in self.workers.values()), default=0),
            "affinity": sorted({cpu for w in self.workers.values() for cpu in w.affinity}),
            "notes": list(self.notes),
            "baseline": self.baseline,
            "baselines": {name: data for name, data in workers.items() if name in self.baselines},
            "variants": {name: data for name, data in workers.items() if name not in self.baselines},
        }


@dataclass
class Samples:
    """The raw durations of one worker, gathered while measuring."""

    medians_ms: dict[str, dict[RoundKey, float]] = field(default_factory=dict)
    runs_ms: dict[str, list[float]] = field(default_factory=dict)
    host_runs_ms: dict[str, list[float]] = field(default_factory=dict)
    energy_j: dict[str, list[float | None]] = field(default_factory=dict)

    def add(self, label: str, mode: str, key: RoundKey, times_ns: Sequence[int], energy_j: float | None) -> None:
        times_ms = [t / 1e6 for t in times_ns]
        if mode == "host":
            self.host_runs_ms.setdefault(label, []).extend(times_ms)
            return
        self.medians_ms.setdefault(label, {})[key] = float(np.median(times_ms))
        self.runs_ms.setdefault(label, []).extend(times_ms)
        per_run = None if energy_j is None else energy_j / len(times_ms)
        self.energy_j.setdefault(label, []).append(per_run)


def time_point(
    samples: dict[str, Samples], name: str, label: str, *, baseline: str, best_of: Sequence[str], seed: int
) -> PointTiming:
    """The figures of worker `name` at point `label`, from everybody's samples."""
    mine = samples[name]
    best = _best(samples, label, baseline, best_of, seed)
    p50, p90, p99 = np.percentile(mine.runs_ms[label], [50, 90, 99])
    host = mine.host_runs_ms.get(label)
    energies = [e for e in mine.energy_j[label] if e is not None]
    return PointTiming(
        p50_ms=float(p50),
        p90_ms=float(p90),
        p99_ms=float(p99),
        host_p50_ms=float(np.median(host)) if host else None,
        runs=len(mine.runs_ms[label]),
        speedup=_ratio(samples, baseline, name, label, baseline, seed),
        speedup_vs_best_pytorch=None if best is None else _ratio(samples, best, name, label, baseline, seed),
        best_pytorch=best,
        energy_j=float(np.mean(energies)) if energies else None,
        rounds=mine.medians_ms[label],
    )


def read_rounds(point: Mapping[str, Any]) -> Rounds:
    """The rounds of a point as `PointTiming.to_dict` writes it."""
    found: dict[RoundKey, float] = {}
    for name, duration in point["rounds_ms"].items():
        group, _, number = name.partition(".")
        found[int(group), int(number)] = float(duration)
    return found


def geometric_mean(points: Sequence[Rounds]) -> Rounds:
    """Of several points, for each round that visited all of them."""
    keys = set.intersection(*(set(rounds) for rounds in points)) if points else set()
    return {key: math.exp(sum(math.log(rounds[key]) for rounds in points) / len(points)) for key in sorted(keys)}


def compare(reference: Rounds, other: Rounds, baseline: Rounds, *, seed: int) -> Ratio | None:
    """How many times faster `other` is than `reference`: paired where they met, else through the baseline.

    Returns:
        ``None`` where neither is possible.
    """
    if (met := _pairs(reference, other)) is not None:
        return paired_ratio(*met, seed=seed)
    here, there = _pairs(baseline, other), _pairs(baseline, reference)
    return None if here is None or there is None else ratio_through(*here, *there, seed=seed)


def _best(samples: dict[str, Samples], label: str, baseline: str, best_of: Sequence[str], seed: int) -> str | None:
    speeds = {name: _ratio(samples, baseline, name, label, baseline, seed) for name in best_of}
    known = {name: ratio.value for name, ratio in speeds.items() if ratio is not None}
    return max(known, key=lambda name: known[name]) if known else None


def _ratio(
    samples: dict[str, Samples], reference: str, name: str, label: str, baseline: str, seed: int
) -> Ratio | None:
    def rounds(of: str) -> Rounds:
        return samples[of].medians_ms.get(label, {}) if of in samples else {}

    return compare(rounds(reference), rounds(name), rounds(baseline), seed=seed)


def _pairs(first: Rounds, second: Rounds) -> tuple[list[float], list[float]] | None:
    keys = sorted(set(first) & set(second))
    return ([first[key] for key in keys], [second[key] for key in keys]) if keys else None
