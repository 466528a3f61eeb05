"""Sessions that sleep instead of computing, and openers that fail, for the tests of the latency harness."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from exporter.artifact import Artifact, InputContract, Signature, TensorSpec
from exporter.errors import RequestError
from exporter.targets.base import Array, Binding, Session


class SleepingBinding(Binding):
    def __init__(self, session: SleepingSession, arrays: dict[str, Array]) -> None:
        self.session = session
        self.arrays = arrays
        self.runs = 0

    def run(self) -> None:
        self.runs += 1
        arguments = self.session.arguments
        if "journal" in arguments:
            _write(arguments["journal"], f"begin {arguments['name']} {time.monotonic_ns()}")
        time.sleep(arguments["milliseconds"] / 1e3 * float(self.arrays["x"].size))
        if "journal" in arguments:
            _write(arguments["journal"], f"end {arguments['name']} {time.monotonic_ns()}")
        if self.runs > arguments.get("runs_until_trouble", 1 << 60):
            if arguments["trouble"] == "crash":
                ctypes.string_at(0)
            time.sleep(600)

    def outputs(self) -> dict[str, Any]:
        return {"y": np.zeros(1, np.float32)}


class SleepingSession(Session):
    def __init__(self, arguments: dict[str, Any]) -> None:
        signature = Signature((TensorSpec("x", "float32", (int(arguments.get("size", 1)),)),), ())
        super().__init__(Artifact(Path("none"), "onnx", signature, InputContract()))
        self.arguments = arguments
        if "ticks" in arguments:  # as the idle threads of a runtime would
            threading.Thread(target=_tick, args=(arguments["ticks"],), daemon=True).start()
        self.ballast = np.ones(int(arguments.get("ballast_bytes", 1)), np.uint8)

    def _bind(self, arrays: dict[str, Array]) -> SleepingBinding:
        return SleepingBinding(self, arrays)

    def executed(self) -> dict[str, Any]:
        return {"runtime": "sleep", "device": "cpu", "precision": "fp32"}


def open_sleeping(arguments: dict[str, Any], *, threads: int) -> Session:
    assert os.environ["OMP_NUM_THREADS"] == str(threads)
    return SleepingSession(arguments)


def open_refusing(arguments: dict[str, Any], *, threads: int) -> Session:
    raise RequestError("the engine does not fit this machine", "avx512")


def open_hanging(arguments: dict[str, Any], *, threads: int) -> Session:
    time.sleep(600)
    raise AssertionError


def open_crashing(arguments: dict[str, Any], *, threads: int) -> Session:
    ctypes.string_at(0)
    raise AssertionError


def _tick(path: str) -> None:
    while True:
        _write(path, f"tick {time.monotonic_ns()}")
        time.sleep(0.001)


def _write(path: str, line: str) -> None:
    with open(path, "a") as journal:
        journal.write(line + "\n")
