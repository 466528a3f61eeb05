"""Building one TensorRT engine: ``python -P tensorrt_child.py REQUEST ANSWER``, a process of its own.

The library is native code: what crashes it, or fills the memory, ends this process only. `tensorrt_builder` writes the
request, reads the answer and gives the errors words. Versions differ in what they offer (TensorRT 10 and 11, TensorRT
for RTX): whatever not all of them have stands behind a look whether it is there, and an option without its feature is
refused, never left out silently.

Beside `exporter.orphans` only the standard library and the TensorRT module are imported here.
"""

from __future__ import annotations

import errno
import importlib
import json
import re
import sys
import time
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
        return {**_build(trt, log, request), "warnings": log.warnings(), "version": version}
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
    kept = _set_timing_cache(config, options)
    start = time.monotonic()
    plan = builder.build_serialized_network(network, config)
    seconds = time.monotonic() - start
    if plan is None:
        raise Refused("build", [{"description": text} for text in log.errors()])
    Path(request["plan"]).write_bytes(memoryview(plan))
    if kept is not None:
        cache = config.get_timing_cache()
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(memoryview(cache.serialize()))
    return {"seconds": seconds, "bytes": plan.nbytes, "layers": layers(log.text())}


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

        def log(self, level: Any, message: str) -> None:
            self.lines.append((level, message))

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
            has = ", ".join(name for name in dir(known) if name.startswith("SM")) or "none"
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


def _set_timing_cache(config: Any, options: Json) -> Path | None:
    """Give the builder the timings of earlier builds, as far as they are of this GPU and version.

    Returns:
        Where they are kept; ``None`` where none are.
    """
    if not options.get("timing_cache"):
        return None
    place = Path(options["timing_cache"])
    cache = config.create_timing_cache(place.read_bytes() if place.is_file() else b"")
    if cache is None:  # damaged, or of another version: begin anew
        cache = config.create_timing_cache(b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return place


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
