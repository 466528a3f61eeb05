"""Sessions on a fake GPU, which sleep and spend energy, for the tests of what a worker tells of its GPU."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from exporter.artifact import Artifact, InputContract, Signature, TensorSpec
from exporter.targets.base import Array, Binding, DeviceBinding, Session
from tests.pipelines.verification.fake_pynvml import FakeNvmlError, FakePynvml


class FakeDeviceBinding(DeviceBinding):
    """A run takes a millisecond and the joules that its input says."""

    def __init__(self, nvml: FakePynvml, joules: float) -> None:
        self.nvml, self.joules = nvml, joules
        self.launched = 0

    def launch(self) -> None:
        self.launched += 1
        self.nvml._spend(self.joules)

    def wait(self) -> None:
        time.sleep(0.001)

    def queued_seconds(self, runs: int) -> float:
        for _ in range(runs):
            self.launch()
        time.sleep(0.001 * runs)
        return 0.001

    def outputs(self) -> dict[str, Any]:
        return {"y": np.zeros(1, np.float32)}


class FakeGpuSession(Session):
    def __init__(self, nvml: FakePynvml) -> None:
        signature = Signature((TensorSpec("x", "float32", (1,)),), (TensorSpec("y", "float32", (1,)),))
        super().__init__(Artifact(Path("none"), "onnx", signature, InputContract()))
        self.nvml = nvml

    def _bind(self, arrays: dict[str, Array]) -> Binding:
        return FakeDeviceBinding(self.nvml, float(arrays["x"][0]))

    def executed(self) -> dict[str, Any]:
        return {"runtime": "fake", "device": "cuda", "precision": "fp32"}


def open_on_fake_gpu(arguments: dict[str, Any], *, threads: int) -> Session:
    """Open one where `pynvml` is faked, its sensors named in ``broken`` excepted, or is not installed."""
    nvml = FakePynvml({name: FakeNvmlError("Not Supported") for name in arguments.get("broken", ())})
    sys.modules["pynvml"] = nvml if arguments["installed"] else None  # type: ignore[assignment]
    return FakeGpuSession(nvml)
