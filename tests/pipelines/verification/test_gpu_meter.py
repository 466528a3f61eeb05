"""What a GPU says of itself, over a fake of NVIDIA's management library, and how it reaches the result."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.targets.base import DeviceBinding
from pipelines.verification.gpu_meter import LONGEST_QUEUE, MEASURE_SECONDS, GpuMeter, observe
from pipelines.verification.latency import Plan, measure
from pipelines.verification.worker_process import WorkerSpec
from tests.pipelines.verification.fake_pynvml import FakeMismatchError, FakeNvmlError, FakePynvml

SENSORS = {
    "energy_j": "nvmlDeviceGetTotalEnergyConsumption",
    "sm_mhz": "nvmlDeviceGetClockInfo",
    "temperature_c": "nvmlDeviceGetTemperature",
    "memory_bytes": "nvmlDeviceGetComputeRunningProcesses",
}
READ = {"energy_j": 1000.0, "sm_mhz": 1980, "temperature_c": 41, "memory_bytes": 512 << 20}


class ClockedBinding(DeviceBinding):
    """Runs take the time and the energy that they are given; the clock moves only while they run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, nvml: FakePynvml, seconds: float, joules: float) -> None:
        self.nvml, self.seconds, self.joules = nvml, seconds, joules
        self.now, self.queues = 0.0, []
        monkeypatch.setattr("pipelines.verification.gpu_meter.time.perf_counter", lambda: self.now)

    def launch(self) -> None:
        raise AssertionError("only queues are observed")

    wait = launch

    def queued_seconds(self, runs: int) -> float:
        self.queues.append(runs)
        self.now += runs * self.seconds
        self.nvml._spend(runs * self.joules)
        return self.seconds

    def outputs(self) -> dict[str, Any]:
        return {}


def metered(monkeypatch: pytest.MonkeyPatch, nvml: Any) -> GpuMeter:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return GpuMeter()


def read(meter: GpuMeter) -> dict[str, Any]:
    return {name: getattr(meter, name)() for name in SENSORS}


def test_all_sensors_of_a_fake_gpu_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = metered(monkeypatch, FakePynvml())
    assert meter.reason == ""
    assert read(meter) == READ


@pytest.mark.parametrize("error", [FakeNvmlError("Not Supported"), FakeMismatchError("an older driver")])
@pytest.mark.parametrize("name", SENSORS)
def test_a_sensor_of_a_fake_gpu_that_is_not_shown_is_none(
    name: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = metered(monkeypatch, FakePynvml({SENSORS[name]: error}))
    assert read(meter) == READ | {name: None}


@pytest.mark.parametrize("function", ["nvmlInit", "nvmlDeviceGetHandleByIndex"])
def test_a_fake_library_that_does_not_start_gives_its_reason(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = metered(monkeypatch, FakePynvml({function: FakeNvmlError("Driver Not Loaded")}))
    assert meter.reason == "NVIDIA's management library answers: Driver Not Loaded"
    assert read(meter) == dict.fromkeys(SENSORS)


def test_without_pynvml_the_reason_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = metered(monkeypatch, None)
    assert "nvidia-ml-py is not installed" in meter.reason
    assert "planish[gpu]" in meter.reason
    assert read(meter) == dict.fromkeys(SENSORS)


def test_the_fake_has_the_functions_and_constants_of_pynvml_itself() -> None:
    real = pytest.importorskip("pynvml")
    assert issubclass(real.NVMLError, Exception)
    for name in (name for name in dir(FakePynvml) if not name.startswith("_")):
        found, fake = getattr(real, name), getattr(FakePynvml, name)
        if isinstance(fake, int):
            assert found == fake, name
        elif inspect.isfunction(fake):
            assert list(inspect.signature(found).parameters) == list(inspect.signature(fake).parameters)[1:], name


def test_energy_of_a_fake_gpu_is_per_run(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakePynvml()
    binding = ClockedBinding(monkeypatch, nvml, seconds=1 / 128, joules=2.0)
    seen = observe(binding, metered(monkeypatch, nvml))
    assert seen["energy_j"] == pytest.approx(2.0)
    assert seen["power_w"] == pytest.approx(256.0)
    assert seen["run_ms"] == pytest.approx(1e3 / 128)
    assert seen["runs_per_s"] == pytest.approx(128)
    assert (seen["sm_mhz"], seen["temperature_c"]) == (1980, 41)
    assert sum(binding.queues[1:]) / 128 >= MEASURE_SECONDS


def test_queues_of_short_runs_are_long_and_those_of_long_runs_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    short, long = (ClockedBinding(monkeypatch, FakePynvml(), seconds, 0.0) for seconds in (1e-5, 2.0))
    monkeypatch.setattr("pipelines.verification.gpu_meter.time.perf_counter", lambda: short.now + long.now)
    meter = metered(monkeypatch, None)
    observe(short, meter)
    assert set(short.queues[1:]) == {LONGEST_QUEUE}
    observe(long, meter)
    assert sum(long.queues) == 2  # a worker has a minute to finish in, for all points together


@pytest.mark.parametrize("name", ["energy_j", "sm_mhz", "temperature_c"])
def test_what_a_fake_gpu_does_not_show_is_none_among_what_it_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakePynvml({SENSORS[name]: FakeNvmlError("Not Supported")})
    seen = observe(ClockedBinding(monkeypatch, nvml, 1 / 128, 2.0), metered(monkeypatch, nvml))
    hidden = {key for key, value in seen.items() if value is None}
    assert hidden == ({"energy_j", "power_w"} if name == "energy_j" else {name})


def test_a_counter_of_a_fake_gpu_that_stands_still_is_not_told_as_no_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakePynvml()
    seen = observe(ClockedBinding(monkeypatch, nvml, 1 / 128, 0.0), metered(monkeypatch, nvml))
    assert (seen["energy_j"], seen["power_w"]) == (None, None)


def test_what_workers_see_of_a_fake_gpu_reaches_the_result(tmp_path: Path) -> None:
    joules = {"1x16": 0.25, "8x128": 2.0}
    points = {}
    for label, value in joules.items():
        points[label] = tmp_path / f"{label}.npz"
        np.savez(points[label], x=np.full(1, value, np.float32))
    here = "tests.pipelines.verification"
    opener = f"{here}.fake_gpu_sessions:open_on_fake_gpu"
    workers = [
        WorkerSpec("eager", opener, {"installed": True}, threads=1, is_baseline=True),
        WorkerSpec("hidden", opener, {"installed": True, "broken": [SENSORS["energy_j"]]}, threads=1),
        WorkerSpec("without", opener, {"installed": False}, threads=1),
        WorkerSpec("processor", f"{here}.sleeping_sessions:open_sleeping", {"name": "p", "milliseconds": 1}, threads=1),
    ]
    plan = Plan(rounds=2, min_rounds=2, min_block_ms=2, host_rounds=1, concurrent_bytes=1 << 40)
    result = measure(workers, points, log=tmp_path / "log", plan=plan)
    assert {name: worker.error for name, worker in result.workers.items()} == dict.fromkeys(result.workers)

    seen = result.workers["eager"]
    assert seen.device["memory_bytes"] == 512 << 20
    for label, value in joules.items():
        assert seen.device["points"][label]["energy_j"] == pytest.approx(value, rel=1e-2)
        assert seen.points[label].energy_j == seen.device["points"][label]["energy_j"]
    assert seen.energy_j == pytest.approx(sum(joules.values()) / 2, rel=1e-2)
    assert seen.energy_reason == ""

    for name, reason in (("hidden", "the GPU shows no energy counter"), ("without", "nvidia-ml-py is not installed")):
        worker = result.workers[name]
        assert worker.energy_j is None
        assert all(point.energy_j is None for point in worker.points.values())
        assert worker.energy_reason.startswith(reason)
        assert all(point["run_ms"] == 1.0 for point in worker.device["points"].values())
    assert result.workers["hidden"].device["points"]["1x16"]["sm_mhz"] == 1980
    assert result.workers["processor"].device == {}

    written = result.to_dict()
    assert written["baselines"]["eager"]["device"] == seen.device
    assert written["baselines"]["eager"]["points"]["8x128"]["energy_j"] == seen.points["8x128"].energy_j
    assert written["variants"]["processor"]["device"] == {}
