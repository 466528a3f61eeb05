"""Building one TensorRT engine: ``python -P tensorrt_child.py REQUEST ANSWER``, a process of its own.

The library is native code: what crashes it, or fills the memory, ends this process only. `tensorrt_builder` writes the
request, reads the answer and gives the errors words. Versions differ in what they offer (TensorRT 10 and 11, TensorRT
for RTX): whatever not all of them have stands behind a look whether it is there, and an option without its feature is
refused, never left out silently.

Beside `exporter.orphans` only the standard library and the TensorRT module are imported here.
"""

from __future__ import annotations

import errno
import fcntl
import importlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exporter.orphans import die_with_parent

Json = dict[str, Any]
FLAGS = {
    "sparse_weights": "SPARSE_WEIGHTS",
    "version_compatible": "VERSION_COMPATIBLE",
    "refit": "REFIT",
    "strip_weights": "STRIP_PLAN",
    "weight_streaming": "WEIGHT_STREAMING",
}
"""The options that are builder flags, by the names of `tensorrt_builder.EngineOptions`."""
LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: ", re.M)
MOST_LINES = 40
DISK_FULL = 28
"""Exit status where the disk is full."""


class Refused(Exception):
    """The request cannot be met: a stage (``import``, ``options``, ``parse``, ``build``) and what stands against it."""

    def __init__(self, stage: str, errors: list[Json]) -> None:
        super().__init__(stage)
        self.stage = stage
        self.errors = errors


def build(request: Json) -> Json:
    """Parse, configure, build and write the plan; returns what the answer says of it."""
    version = ""
    try:
        trt = _module(request["module"])
        version = trt.__version__
        log = _logger(trt)
        built = _build(trt, log, request)
        return {**built, "warnings": [*log.warnings(), *built["warnings"]], "version": version}
    except Refused as refused:
        return {"stage": refused.stage, "errors": refused.errors, "version": version}


def _build(trt: Any, log: Any, request: Json) -> Json:
    options = request["options"]
    builder = trt.Builder(log)
    # What the graph says of types is meant: no version may choose others. TensorRT 10 does so where it is asked.
    strongly = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    network = builder.create_network(1 << int(strongly))
    config = builder.create_builder_config()
    _configure(trt, log, config, options)
    _parse(trt, network, log, request["onnx"])
    for profile in request["profiles"]:
        config.add_optimization_profile(_profile(builder, profile))
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = _monitor(trt)
    kept = timings_file(request, trt.__version__)
    if kept is not None:
        with log.unheard():  # what it says of timings that are of no use is no reason for anything
            give_timings(config, kept)
    start = time.monotonic()
    plan = builder.build_serialized_network(network, config)
    seconds = time.monotonic() - start
    if plan is None:
        raise Refused("build", [{"description": text} for text in log.errors()])
    Path(request["plan"]).write_bytes(memoryview(plan))
    warnings = []
    if kept is not None:
        try:
            with log.unheard():
                keep_timings(config, kept)
        except OSError as failure:  # the engine is there all the same
            warnings.append(f"The timings were not kept: {failure}")
    return {"seconds": seconds, "bytes": plan.nbytes, "layers": layers(log.text()), "warnings": warnings}


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise Refused("import", [{"description": f"{type(error).__name__}: {error}"}]) from error


def _logger(trt: Any) -> Any:
    severity = trt.ILogger.Severity
    bad = (severity.INTERNAL_ERROR, severity.ERROR)

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[tuple[Any, str]] = []
            self.hears = True

        def log(self, level: Any, message: str) -> None:
            if self.hears:
                self.lines.append((level, message))

        @contextmanager
        def unheard(self) -> Iterator[None]:
            self.hears = False
            try:
                yield
            finally:
                self.hears = True

        def errors(self) -> list[str]:
            return [message for level, message in self.lines if level in bad]

        def warnings(self) -> list[str]:
            told = [message for level, message in self.lines if level == severity.WARNING]
            return [message for message in told if not message.endswith("Int64 binding.")][:MOST_LINES]

        def text(self) -> str:
            return "\n".join(message for _, message in self.lines)

    return Log()


def _monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Tells the parent, a line of JSON each, which phase has come how far."""

        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            self.tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.tell(phase_name, step + 1)
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

        def tell(self, phase: str, done: int) -> None:
            print(json.dumps({"phase": phase, "done": done, "of": self.steps.get(phase, 0)}), flush=True)

    return Monitor()


def _configure(trt: Any, log: Any, config: Any, options: Json) -> None:
    """Set every option; all that this version lacks are told at once."""
    lacking: list[Json] = []

    def lacks(option: str, what: str) -> None:
        lacking.append({"option": option, "description": what})

    for option, flag in FLAGS.items():
        if not options.get(option):
            continue
        if (value := getattr(trt.BuilderFlag, flag, None)) is None:
            lacks(option, f"BuilderFlag.{flag}")
        else:
            config.set_flag(value)
    if not options.get("tf32"):
        config.clear_flag(trt.BuilderFlag.TF32)
    if (level := options.get("level")) is not None:
        config.builder_optimization_level = level
    if (workspace := options.get("workspace_bytes")) is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    if (wanted := options.get("hardware_compatible")) is not None:
        known = getattr(trt, "HardwareCompatibilityLevel", None)
        if (value := getattr(known, wanted, None)) is None:
            lacks("hardware_compatible", f"HardwareCompatibilityLevel.{wanted}")
        else:
            config.hardware_compatibility_level = value
            if any("is unsupported in" in message for message in log.warnings()):  # TensorRT for RTX only says so
                lacks("hardware_compatible", "it is there, and without effect")
    if capabilities := options.get("compute_capabilities"):
        known = getattr(trt, "ComputeCapability", None)
        values = [getattr(known, name, None) for name in capabilities]
        if None in values:
            numbers = sorted(int(name[2:]) for name in dir(known) if re.fullmatch(r"SM\d+", name))
            has = ", ".join(f"SM{number}" for number in numbers) or "none"
            lacks("compute_capabilities", f"{capabilities[values.index(None)]}; it builds for {has}")
        else:
            config.num_compute_capabilities = len(values)
            for place, value in enumerate(values):
                config.set_compute_capability(value, place)
    if lacking:
        raise Refused("options", lacking)


def _parse(trt: Any, network: Any, log: Any, path: str) -> None:
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(path):
        return
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        found.append(
            {
                "node": error.node_name() if hasattr(error, "node_name") else "",
                "operator": error.node_operator() if hasattr(error, "node_operator") else "",
                "description": error.desc(),
            }
        )
    raise Refused("parse", found or [{"description": text} for text in log.errors()])


def _profile(builder: Any, shapes: Json) -> Any:
    profile = builder.create_optimization_profile()
    for name, (least, usual, most) in shapes.items():
        profile.set_shape(name, tuple(least), tuple(usual), tuple(most))
    return profile


def timings_name(module: str, version: str, gpus: Sequence[str]) -> str:
    """The file of the timings of one library in one version, for these GPUs: none of another is ever given to it."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", "-".join([module, version, *sorted(set(gpus))])) + ".timings"


def timings_file(request: Json, version: str) -> Path | None:
    """Where the timings of a build are kept; ``None`` where none are to be, or it is not known for which GPU."""
    folder = request["options"].get("timing_cache")
    if not folder or not request["gpus"]:
        return None
    return Path(folder) / timings_name(request["module"], version, request["gpus"])


def give_timings(config: Any, place: Path) -> None:
    """Give the builder the timings of earlier builds; where they are damaged or do not fit, it begins anew."""
    cache = _timings(config, place)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def keep_timings(config: Any, place: Path) -> None:
    """Write the timings of a build, and with them those that other builds wrote since it began.

    Whoever reads the file meanwhile gets the old one or the new one, whole.
    """
    if (cache := config.get_timing_cache()) is None:
        return
    content = bytes(memoryview(cache.serialize()))
    place.parent.mkdir(parents=True, exist_ok=True)
    with _alone(place.with_name(f".{place.name}.lock")):
        others = _timings(config, place) if place.is_file() else None
        if others is not None:
            cache = config.create_timing_cache(content)  # the builder's own is not to be changed
            if cache is not None and cache.combine(others, ignore_mismatch=False):
                content = bytes(memoryview(cache.serialize()))
        part = place.with_name(f".{place.name}.part")
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(place)


def _timings(config: Any, place: Path) -> Any:
    """What a file holds; nothing where it is not there, ``None`` where it is damaged or of another version."""
    try:
        content = place.read_bytes()
    except OSError:
        content = b""
    return config.create_timing_cache(content)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """While nobody else holds the lock; it goes with the process that holds it."""
    with lock.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def layers(text: str) -> list[Json]:
    """The layers of an engine, as the builder lists them at its most detailed: name, kind, types of the inputs."""
    return [
        {
            "name": found["name"],
            "kind": found["kind"],
            "inputs": re.findall(r"Datatype: (\w+)", found["inputs"]),
        }
        for found in LAYER.finditer(text)
    ]


def main() -> int:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    die_with_parent(request["parent"])  # a builder that nobody waits for, and whose limits nobody watches
    try:
        answer = build(request)
        Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")
    except OSError as failure:
        if failure.errno in (errno.ENOSPC, errno.EDQUOT):
            return DISK_FULL
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
