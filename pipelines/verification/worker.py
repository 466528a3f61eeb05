"""The process in which one session is timed: it opens it, binds the inputs of every point, and times blocks when told.

Messages to the parent: ``ready`` (what runs, with which threads), ``block`` (durations of one block), ``finished``
(peak memory; of a GPU, what it does when it is kept busy). Commands from it: ``{"do": "block", "point": …, "mode":
"binding" | "host", "min_seconds": …}`` and ``{"do": "finish"}``.
"""

from __future__ import annotations

import gc
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import InternalError, RequestError, first_line
from exporter.hardware import affinity
from exporter.targets.base import Binding, DeviceBinding, Session
from pipelines.processes import inside
from pipelines.processes.file_pages import release_file_pages
from pipelines.verification.energy import EnergyMeter, open_meter
from pipelines.verification.gpu_meter import MEASURE_SECONDS, UNSEEN, GpuMeter, observe

WARM_RUNS = 3
WARM_SECONDS = 0.2
LONG_RUN_SECONDS = 0.5
MAX_RUNS_PER_BLOCK = 20_000
MOST_SECONDS = 20.0
"""For observing a GPU at all points together."""


def load_inputs(path: Path) -> dict[str, np.ndarray]:
    """Read the inputs of one point, by name, from a ``.safetensors`` or ``.npz`` file.

    Raises:
        RequestError: The file is missing or of another kind.
    """
    if not path.is_file():
        raise RequestError("the inputs to measure with are missing", path)
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        return dict(load_file(path))
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    raise RequestError("inputs must be a .safetensors or .npz file", path)


def serve(arguments: dict[str, Any]) -> dict[str, Any]:
    """Open the session and time blocks until told to finish. Runs as a job.

    Args:
        arguments: ``opener`` (``"module:function"``, called as ``opener(arguments, threads=n)``), its ``arguments``,
            ``threads``, ``points``: the path of the inputs by the point's label, and ``sparing``: memory is short,
            so that what was read of the model's files and is not used any more is given back before the timing.
    """
    opened = time.perf_counter()
    opener = _resolve(arguments["opener"])
    session = opener(arguments["arguments"], threads=arguments["threads"])
    points: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
    bindings: dict[str, Binding] = {}
    for label, path in arguments["points"].items():
        inputs = load_inputs(Path(path))
        bindings[label] = session.bind(inputs)
        points[label] = _runs(session, bindings[label], inputs)
        _warm(points[label][0])
    if arguments["sparing"] and release_file_pages():
        for run, _ in points.values():  # what is in use after all is read again now, not while it is timed
            _warm(run)
    meter = open_meter()
    inside.send(
        "ready",
        {
            "executed": session.executed(),
            "threads": arguments["threads"],
            "affinity": affinity(),
            "energy_reason": meter.reason,
            "open_seconds": time.perf_counter() - opened,
        },
    )
    for command in inside.commands():
        if command["do"] == "finish":
            break
        timed, host = points[command["point"]]
        run = timed if command["mode"] == "binding" else host
        inside.send("block", time_block(run, command["min_seconds"], meter))
    inside.send("finished", {"peak_rss_bytes": inside.peak_rss_bytes(), "device": _observe(bindings)})
    session.close()
    return {}


def time_block(run: Callable[[], Any], min_seconds: float, meter: EnergyMeter) -> dict[str, Any]:
    """Run again and again for at least `min_seconds` (one long run may be the whole block).

    One run before it is not counted: the caches hold the last worker's data, and the threads have slept. A run so
    long that this hardly matters is counted at once.

    Returns:
        ``times_ns``: the duration of each counted run; ``energy_j``: of the block, or ``None``.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        clock = time.perf_counter_ns
        before = meter.read_uj()
        begin = clock()
        run()
        last = clock()
        times: list[int] = []
        if last - begin >= LONG_RUN_SECONDS * 1e9:
            times.append(last - begin)
        else:
            before = meter.read_uj()
            begin = last = clock()
        end = begin + int(min_seconds * 1e9)
        while (last < end or not times) and len(times) < MAX_RUNS_PER_BLOCK:
            run()
            now = clock()
            times.append(now - last)
            last = now
        return {"times_ns": times, "energy_j": meter.joules_since(before)}
    finally:
        if collecting:
            gc.enable()


def _observe(bindings: dict[str, Binding]) -> dict[str, Any]:
    """What a GPU does while it is kept busy, by point; empty where the processor runs the model."""
    working = {label: binding for label, binding in bindings.items() if isinstance(binding, DeviceBinding)}
    if not working:
        return {}
    meter = GpuMeter()
    found: dict[str, Any] = {"reason": meter.reason, "memory_bytes": meter.memory_bytes(), "points": {}}
    seconds = min(MEASURE_SECONDS, MOST_SECONDS / len(working))
    for label, binding in working.items():
        try:
            found["points"][label] = observe(binding, meter, seconds)
        except Exception as error:  # whatever the runtime raises: the durations that were taken before it are right
            found["points"][label] = UNSEEN
            found["reason"] = found["reason"] or f"the GPU could not be observed at {label}: {first_line(error)}"
    return found


def _runs(
    session: Session, binding: Binding, inputs: dict[str, np.ndarray]
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    return binding.run, lambda: session.run(inputs)


def _warm(run: Callable[[], Any]) -> None:
    """Let lazy compilation, allocation and thread pools settle: a few runs, or a fifth of a second of them."""
    start = time.perf_counter()
    for done in range(1, 1000):
        run()
        elapsed = time.perf_counter() - start
        if elapsed > LONG_RUN_SECONDS or (done >= WARM_RUNS and elapsed > WARM_SECONDS):
            return


def _resolve(name: str) -> Callable[..., Session]:
    module, _, attribute = name.partition(":")
    opener = getattr(importlib.import_module(module), attribute, None)
    if opener is None:
        raise InternalError("no such opener", name)
    return opener
