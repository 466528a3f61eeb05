"""What a GPU says of itself while it works: energy, clock, temperature, memory. NVIDIA's management library knows."""

from __future__ import annotations

import os
import time
from typing import Any

from exporter.targets.base import DeviceBinding

LONGEST_QUEUE = 2000
"""Runs given to the device before the host waits for it."""
MEASURE_SECONDS = 0.6
"""The energy counter moves about every tenth of a second: a window has to be several of these long."""


UNSEEN: dict[str, Any] = dict.fromkeys(
    ("run_ms", "runs_per_s", "energy_j", "power_w", "sm_mhz", "temperature_c")
)  # None of each
"""What `observe` returns, where nothing could be seen."""


class GpuMeter:
    """The first GPU's sensors.

    Attributes:
        reason: Why nothing can be read; empty where it can.
    """

    def __init__(self) -> None:
        self.reason = ""
        self._nvml: Any = None
        self._errors: tuple[type[Exception], ...] = ()
        try:
            import pynvml
        except ImportError:
            self.reason = "nvidia-ml-py is not installed: pip install 'planish[gpu]'"
            return
        # An older driver lacks functions of newer bindings: that is an error of another kind.
        self._errors = (pynvml.NVMLError, getattr(pynvml, "NVMLLibraryMismatchError", pynvml.NVMLError))
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            self._nvml = pynvml
        except self._errors as error:
            self.reason = f"NVIDIA's management library answers: {error}"

    def energy_j(self) -> float | None:
        """Joules since the driver was loaded."""
        found = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if found is None else found / 1e3

    def sm_mhz(self) -> int | None:
        """Clock of the multiprocessors."""
        return self._ask("nvmlDeviceGetClockInfo", 1)  # NVML_CLOCK_SM

    def temperature_c(self) -> int | None:
        return self._ask("nvmlDeviceGetTemperature", 0)  # NVML_TEMPERATURE_GPU

    def memory_bytes(self) -> int | None:
        """What this process holds of the GPU's memory, its context included."""
        processes = self._ask("nvmlDeviceGetComputeRunningProcesses") or []
        return next((p.usedGpuMemory for p in processes if p.pid == os.getpid()), None)

    def _ask(self, function: str, *arguments: Any) -> Any:
        if self._nvml is None:
            return None
        try:
            return getattr(self._nvml, function)(self._handle, *arguments)
        except self._errors:  # a virtual machine may be shown less
            return None


def observe(binding: DeviceBinding, meter: GpuMeter, seconds: float = MEASURE_SECONDS) -> dict[str, Any]:
    """Keep the device busy with runs one after the other for at least `seconds`, and read its sensors.

    Returns:
        ``run_ms`` (a run among others, by the device's clock where that is known), ``runs_per_s``, ``energy_j`` of the
        GPU per run, ``power_w``, ``sm_mhz`` and ``temperature_c`` at the end; what cannot be read is ``None``.
    """
    once = max(binding.queued_seconds(1), 1e-6)
    runs = max(1, min(LONGEST_QUEUE, int(seconds / once / 4)))
    before, begin = meter.energy_j(), time.perf_counter()
    done, times = 0, []
    while (elapsed := time.perf_counter() - begin) < seconds:
        times.append(binding.queued_seconds(runs))
        done += runs
    after, clock, warmth = meter.energy_j(), meter.sm_mhz(), meter.temperature_c()
    spent = None if before is None or after is None or after == before else after - before  # it may stand still
    return {
        "run_ms": 1e3 * sorted(times)[len(times) // 2],
        "runs_per_s": done / elapsed,
        "energy_j": None if spent is None else spent / done,
        "power_w": None if spent is None else spent / elapsed,
        "sm_mhz": clock,
        "temperature_c": warmth,
    }
