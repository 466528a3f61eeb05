"""A fake of NVIDIA's management library as `pynvml` binds it: one GPU, whose sensors say what tests set."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any


class FakeNvmlError(Exception):
    """Stands for `pynvml.NVMLError`."""


class FakeMismatchError(Exception):
    """Stands for `pynvml.NVMLLibraryMismatchError`, which is no `NVMLError`."""


class FakePynvml:
    """Stands for the module.

    Args:
        broken: By function's name, what it raises.
    """

    NVMLError = FakeNvmlError
    NVMLLibraryMismatchError = FakeMismatchError
    NVML_TEMPERATURE_GPU, NVML_CLOCK_SM = 0, 1

    def __init__(self, broken: dict[str, Exception] | None = None) -> None:
        self._broken = broken or {}
        self._joules = 1000.0

    def _spend(self, joules: float) -> None:
        self._joules += joules

    def _check(self, function: str, handle: str = "first") -> None:
        assert handle == "first"
        if function in self._broken:
            raise self._broken[function]

    def nvmlInit(self) -> None:
        self._check("nvmlInit")

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        self._check("nvmlDeviceGetHandleByIndex")
        assert index == 0
        return "first"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        self._check("nvmlDeviceGetTotalEnergyConsumption", handle)
        return round(1e3 * self._joules)

    def nvmlDeviceGetClockInfo(self, handle: str, type: int) -> int:
        self._check("nvmlDeviceGetClockInfo", handle)
        return {self.NVML_CLOCK_SM: 1980}[type]

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        self._check("nvmlDeviceGetTemperature", handle)
        return {self.NVML_TEMPERATURE_GPU: 41}[sensor]

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        self._check("nvmlDeviceGetComputeRunningProcesses", handle)
        return [SimpleNamespace(pid=1, usedGpuMemory=7), SimpleNamespace(pid=os.getpid(), usedGpuMemory=512 << 20)]
