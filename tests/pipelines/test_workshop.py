"""What a stage's identity is made of, and which measurements are kept for later runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from exporter import hardware
from pipelines.cache import Cache, StageKey
from pipelines.code_digest import code_modules
from pipelines.judging import RACE_CODE
from pipelines.progress import Progress
from pipelines.workshop import Workshop


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Workshop]:
    with Cache(tmp_path / "cache") as cache:
        yield Workshop(cache, Progress(quiet=True), tmp_path / "log.txt", threads=1)


def race_key(shop: Workshop, **inputs: Any) -> StageKey:
    return shop.key("race", RACE_CODE, inputs=inputs, bound_to_machine=True, timed=True)


def compiled_key(shop: Workshop) -> StageKey:
    return shop.key("build", "pipelines.stages.transform:build", inputs={}, bound_to_machine=True)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two processors")
def test_timings_belong_to_the_processors_that_a_process_may_use(shop: Workshop) -> None:
    allowed = os.sched_getaffinity(0)
    timed, compiled = race_key(shop).id, compiled_key(shop).id
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert race_key(shop).id != timed
        assert compiled_key(shop).id == compiled, "an engine is the same on fewer processors"
    finally:
        os.sched_setaffinity(0, allowed)
    assert race_key(shop).id == timed


@pytest.mark.parametrize(
    ("file", "text"),
    [("/proc/cpuinfo", "model name : Another\nflags : avx2\n"), ("/etc/machine-id", "another\n"),
     ("/sys/fs/cgroup/cpu.max", "150000 100000\n")],
)  # fmt: skip
def test_timings_belong_to_a_machine(shop: Workshop, monkeypatch: pytest.MonkeyPatch, file: str, text: str) -> None:
    """Another machine is played by what its system would say of it."""
    timed, read = race_key(shop).id, hardware._read
    monkeypatch.setattr(hardware, "_read", lambda path: text if path == file else read(path))
    assert race_key(shop).id != timed


def test_timings_belong_to_the_code_that_opens_and_runs_a_session() -> None:
    reached = code_modules(*RACE_CODE)
    assert {
        "pipelines.verification.worker",
        "exporter.targets.onnxruntime",
        "exporter.targets.openvino",
        "exporter.targets.inductor",
        "exporter.targets.pytorch",
    } <= set(reached)


def test_only_what_is_worth_it_is_kept(shop: Workshop) -> None:
    made = iter(range(10))

    def measure(busy: float) -> dict[str, Any]:
        return shop.measure(
            race_key(shop), "Measure", lambda: {"busy": busy, "number": next(made)}, lambda found: found["busy"] < 0.25
        )

    assert [measure(0.9), measure(0.1), measure(0.1)] == [
        {"busy": 0.9, "number": 0},
        {"busy": 0.1, "number": 1},
        {"busy": 0.1, "number": 1},
    ]
    assert [stage["cached"] for stage in shop.timeline] == [False, False, True]


@pytest.mark.slow
def test_a_source_is_timed_anew_each_time(
    model_folder: Any, cache: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.recipe import Recipe
    from pipelines.runner import bench_source
    from tests.pipelines.jobs import SMALL

    monkeypatch.setenv("PLANISH_CACHE", str(cache))
    recipe = Recipe.from_source(str(model_folder("bert")), overrides=[*SMALL, f"data.evaluation={texts}"])
    first, second = bench_source(recipe), bench_source(recipe)
    assert first["seconds"] != second["seconds"]
