"""A process on the simulated GPU: CUDA builds of ONNX Runtime and torch above simulated CUDA libraries."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.exporter.targets.simulated_cuda.build import build

PACKAGES = Path(sys.prefix) / "simulated-gpu"
"""Where `make simulated-gpu` puts the CUDA builds and CUDA's headers."""
ROOT = Path(__file__).parents[4]
SCENARIOS = Path(__file__).with_name("scenarios.py")


def lacking() -> str:
    """What has to be done first; empty if nothing."""
    if not (PACKAGES / ".complete").exists():
        return "`make simulated-gpu` has not been run"
    missing = [tool for tool in ("g++", "nm", "readelf") if shutil.which(tool) is None]
    return f"the simulated libraries are built with {', '.join(missing)}, which is not here" if missing else ""


class SimulatedGpu:
    """The simulated libraries, and processes that find them.

    Args:
        folder: Where they are built, in a second or two.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        runtimes = [
            PACKAGES / "onnxruntime/capi/libonnxruntime_providers_cuda.so",
            *sorted((PACKAGES / "torch/lib").glob("lib*.so")),
        ]
        build(folder, runtimes, PACKAGES / "nvidia/cu13/include")

    def run(self, scenario: str, *, ends: int = 0, env: dict[str, str] | None = None, **given: Any) -> dict[str, Any]:
        """Do one of the scenarios and return what it told, with the calls that were refused and counted.

        Args:
            scenario: Its name in `scenarios`.
            ends: The process's exit status, which is asserted.
            env: Beside this process's environment.
            given: The scenario's arguments.
        """
        environment = os.environ | (env or {})
        environment["LD_LIBRARY_PATH"] = str(self._folder)
        environment["PYTHONPATH"] = os.pathsep.join([str(PACKAGES), str(ROOT)])
        command = [sys.executable, str(SCENARIOS), scenario, json.dumps(given)]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert ended.returncode == ends, ended.stderr[-3000:]
        told: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
        return told
