from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file

from exporter.errors import RequestError
from pipelines.baselines import PYTORCH
from pipelines.verification.latency import Plan, _used_seconds, measure, plan_groups
from pipelines.verification.worker_process import WorkerSpec

SESSIONS = "tests.pipelines.verification.sleeping_sessions"
QUICK = Plan(rounds=4, min_rounds=4, min_block_ms=10, host_rounds=1, concurrent_bytes=1 << 40)


def spec(name: str, milliseconds: float, *, opener: str = "open_sleeping", **more: Any) -> WorkerSpec:
    options = {key: more.pop(key) for key in ("files", "estimated_bytes") if key in more}
    arguments = {"name": name, "milliseconds": milliseconds, **more}
    known = name in PYTORCH
    return WorkerSpec(name, f"{SESSIONS}:{opener}", arguments, threads=1, is_baseline=known, **options)


@pytest.fixture
def points(tmp_path: Path) -> dict[str, Path]:
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "a.safetensors")
    np.savez(tmp_path / "b.npz", x=np.zeros(1, np.float32))
    return {"1x16": tmp_path / "a.safetensors", "8x128": tmp_path / "b.npz"}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log.txt"


def test_ratios_percentiles_and_facts_of_sleeping_sessions(points: dict[str, Path], log: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(bytes(1234))
    workers = [
        spec("eager", 12),
        spec("compile", 6, ballast_bytes=200 << 20),
        spec("quick", 2, files=(file,)),
    ]
    lines: list[str] = []
    result = measure(workers, points, log=log, plan=QUICK, on_line=lines.append)
    assert result.rounds == 4
    assert result.baselines == ("eager", "compile")
    assert lines[0] == "opening eager, compile, quick"
    for label in points:
        eager, quick = result.workers["eager"].points[label], result.workers["quick"].points[label]
        assert eager.speedup is not None
        assert (eager.speedup.low, eager.speedup.value, eager.speedup.high) == (1, 1, 1)
        assert quick.p50_ms >= 2
        assert quick.p50_ms <= quick.p90_ms <= quick.p99_ms
        assert quick.host_p50_ms is not None
        assert quick.host_p50_ms >= 2
        assert quick.runs >= 4
        assert quick.speedup is not None
        assert quick.speedup_vs_best_pytorch is not None
        assert quick.best_pytorch == "compile"
        assert quick.speedup.low <= quick.speedup.value <= quick.speedup.high
        assert quick.speedup.value > quick.speedup_vs_best_pytorch.value > 1
        assert quick.speedup.value < 50  # milliseconds against milliseconds, whatever the noise
    worker = result.workers["quick"]
    assert worker.executed["runtime"] == "sleep"
    assert worker.file_bytes == 1234
    assert worker.affinity
    assert worker.energy_j is None or worker.energy_j > 0
    assert (worker.energy_j is None) == bool(worker.energy_reason)
    heavy, light = result.workers["compile"].peak_rss_bytes, worker.peak_rss_bytes
    assert heavy is not None
    assert light is not None
    assert heavy > light + (150 << 20)
    data = result.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert set(data["baselines"]) == {"eager", "compile"}
    assert set(data["variants"]) == {"quick"}
    assert {"p50_ms", "speedup_low", "speedup_vs_best_pytorch_high"} <= set(data["variants"]["quick"]["points"]["1x16"])


def test_only_one_worker_runs_at_a_time_and_the_order_varies(
    points: dict[str, Path], log: Path, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    workers = [spec(name, 1, journal=str(journal)) for name in ("eager", "b", "c")]
    lines: list[int] = []

    def on_line(text: str) -> None:
        if ", round 1," in text:
            lines.append(len(journal.read_text().splitlines()))

    measure(workers, {"p": points["1x16"]}, log=log, plan=QUICK, on_line=on_line)
    events = [line.split() for line in journal.read_text().splitlines()[lines[0] :]]
    events.sort(key=lambda event: int(event[2]))
    open_now: set[str] = set()
    visits: list[str] = []
    for kind, name, _ in events:
        if kind == "begin":
            open_now.add(name)
            if not visits or visits[-1] != name:
                visits.append(name)
        else:
            open_now.discard(name)
        assert len(open_now) <= 1
    assert set(visits) == {"eager", "b", "c"}
    assert len({tuple(visits[i : i + 3]) for i in range(0, len(visits) - 2, 3)}) > 1


def test_an_idle_workers_threads_stand_still_while_another_is_timed(
    points: dict[str, Path], log: Path, tmp_path: Path
) -> None:
    journal, ticks = tmp_path / "journal", tmp_path / "ticks"
    workers = [spec("eager", 5, journal=str(journal)), spec("restless", 5, ticks=str(ticks))]
    seen: list[int] = []

    def on_line(text: str) -> None:
        if ", round 1," in text:
            seen.append(len(journal.read_text().splitlines()))

    measure(workers, {"p": points["1x16"]}, log=log, plan=QUICK, on_line=on_line)
    ends = [int(line.split()[-1]) for line in journal.read_text().splitlines()[seen[0] :]]
    times = [int(line.split()[1]) for line in ticks.read_text().splitlines()]
    assert len(times) > 20  # it does tick
    for begin, end in zip(ends[::2], ends[1::2], strict=True):
        assert not [time for time in times if begin < time < end]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (spec("bad", 1, opener="open_refusing", files=(Path("no-such-file"),)), "does not fit this machine: avx512"),
        (spec("bad", 1, opener="open_crashing"), "SIGSEGV"),
        pytest.param(spec("bad", 1, opener="open_hanging"), "not ready within", marks=pytest.mark.slow),
        (spec("bad", 1, opener="no_such_opener"), "no such opener"),
        (spec("bad", 1, runs_until_trouble=210, trouble="crash"), "SIGSEGV"),
        (spec("bad", 1, runs_until_trouble=210, trouble="hang"), "no answer within"),
        (spec("bad", 1, size=2), "wrong shape"),
    ],
)
def test_a_worker_that_fails_does_so_alone(points: dict[str, Path], log: Path, bad: WorkerSpec, words: str) -> None:
    plan = Plan(
        rounds=10, min_rounds=10, min_block_ms=100, host_rounds=0, open_timeout_s=14, block_timeout_s=4, budget_s=1
    )
    result = measure([spec("eager", 2), bad, spec("good", 1)], {"p": points["1x16"]}, log=log, plan=plan)
    assert words in (result.workers["bad"].error or "")
    assert result.workers["bad"].points == {}
    assert result.workers["good"].error is None
    assert result.workers["good"].points["p"].speedup is not None


def test_without_the_baseline_there_are_timings_but_no_ratios(points: dict[str, Path], log: Path) -> None:
    result = measure(
        [spec("eager", 1, opener="open_refusing"), spec("good", 1)], {"p": points["1x16"]}, log=log, plan=QUICK
    )
    timing = result.workers["good"].points["p"]
    assert timing.p50_ms >= 1
    assert timing.speedup is None
    assert timing.speedup_vs_best_pytorch is None
    assert any("failed" in note for note in result.notes)


def test_workers_that_do_not_fit_together_are_measured_in_groups_with_the_baseline(
    points: dict[str, Path], log: Path
) -> None:
    workers = [spec(name, ms, estimated_bytes=10) for name, ms in (("eager", 60), ("compile", 10), ("quick", 1))]
    plan = Plan(rounds=5, min_block_ms=5, host_rounds=0, concurrent_bytes=20)
    result = measure(workers, {"p": points["1x16"]}, log=log, plan=plan)
    quick = result.workers["quick"].points["p"]
    assert quick.best_pytorch == "compile"
    assert quick.speedup is not None
    assert quick.speedup_vs_best_pytorch is not None
    assert quick.speedup.value > quick.speedup_vs_best_pytorch.value > 1
    assert any("groups" in note for note in result.notes)


def test_groups_hold_the_baseline_and_as_many_others_as_fit() -> None:
    sizes = {"eager": 5, "a": 3, "b": 3, "c": 9, "d": 1}
    workers = [spec(name, 1, estimated_bytes=size) for name, size in sizes.items()]

    def names(limit: int) -> list[list[str]]:
        return [[s.name for s in group] for group in plan_groups(workers, "eager", limit)]

    assert names(21) == [["eager", "a", "b", "c", "d"]]
    assert names(11) == [["eager", "a", "b"], ["eager", "c"], ["eager", "d"]]
    assert names(1) == [["eager", "a"], ["eager", "b"], ["eager", "c"], ["eager", "d"]]
    assert [[s.name for s in g] for g in plan_groups(workers[:1], "eager", 1)] == [["eager"]]


def test_rounds_stop_at_the_budget_but_not_below_the_minimum(points: dict[str, Path], log: Path) -> None:
    point = {"p": points["1x16"]}
    plan = Plan(rounds=1000, min_rounds=6, min_block_ms=20, host_rounds=0, budget_s=0)
    assert measure([spec("eager", 1)], point, log=log, plan=plan).rounds == 6


def test_processor_time_that_others_take_is_said(points: dict[str, Path], log: Path) -> None:
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    try:
        plan = Plan(rounds=12, min_rounds=12, min_block_ms=50, host_rounds=0)
        result = measure([spec("eager", 1)], {"p": points["1x16"]}, log=log, plan=plan)
    finally:
        for process in spinning:
            process.kill()
            process.wait()
    assert 0.1 < result.busy_elsewhere <= 1
    assert any("Other processes" in note for note in result.notes)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_only_processors_that_may_be_used_count() -> None:
    allowed = os.sched_getaffinity(0)
    everything = _used_seconds([])
    os.sched_setaffinity(0, {min(allowed)})
    try:
        one = _used_seconds([])
    finally:
        os.sched_setaffinity(0, allowed)
    assert one[2] == pytest.approx(psutil.cpu_times(percpu=True)[min(allowed)].idle + one[1], rel=0.1)
    assert one[2] < 0.75 * everything[2]


def test_nothing_to_measure_and_double_names_are_refused(points: dict[str, Path], log: Path) -> None:
    for workers, at in (([], points), ([spec("a", 1)], {}), ([spec("a", 1), spec("a", 2)], points)):
        with pytest.raises(RequestError):
            measure(workers, at, log=log)


def test_an_interrupt_ends_all_workers(points: dict[str, Path], log: Path) -> None:
    code = (
        "from pathlib import Path; from pipelines.verification.latency import *\n"
        "from tests.pipelines.verification.test_latency import spec\n"
        f"measure([spec('eager', 1), spec('b', 1)], {{'p': Path({str(points['1x16'])!r})}}, log=Path({str(log)!r}), "
        "plan=Plan(rounds=10**6, budget_s=600), on_line=lambda t: print(t, flush=True))"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert parent.stdout is not None
    while ", round 3" not in parent.stdout.readline():
        assert parent.poll() is None
    children = [int(pid) for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]
    assert len(children) == 3  # two workers and the watcher
    parent.send_signal(signal.SIGINT)
    parent.wait(20)
    parent.stdout.close()
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
