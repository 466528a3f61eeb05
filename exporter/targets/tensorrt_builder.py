"""Building TensorRT engines: what is asked of the builder, and the process that it runs in.

One builder serves ``tensorrt`` 10 and 11 and ``tensorrt_rtx``: graphs are strongly typed on all of them, so precision
is what the ONNX file says. TensorRT for RTX builds for GPUs that are named (`EngineOptions.compute_capabilities`) and
needs none itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exporter.artifact import Signature
from exporter.errors import EnvironmentLackError, RequestError
from exporter.hardware import gpu
from exporter.targets import tensorrt_child
from exporter.targets.tensorrt_errors import RTX, TENSORRT, OptionError, crashed, explain

FAR_APART = 16
"""Operating points whose work (the product of their axes) differs by more than this have profiles of their own."""
PRODUCTS, ATTENTION = ("gemm", "correlation"), "_gemm_mha"
"""Kinds of layers that are matrix products and convolutions alone, and how the name of a fused attention begins."""
WIDE = ("Float", "Half", "BFloat16")
POLL_SECONDS = 0.2
HIGHEST_LEVEL = 5
Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""By input: the smallest, the usual and the largest shape."""


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is built. What the installed version lacks is refused.

    Attributes:
        compute_capabilities: GPUs to build for without having them, as ``"SM89"`` (TensorRT for RTX only, which asks
            for some where this machine has no GPU); empty: the GPU of this machine.
        tf32: Multiply FP32 with ten bits of mantissa, as the library does unless told otherwise.
        level: Builder optimization level, 0 to 5; ``None``: the library's.
        workspace_bytes: Most scratch memory that a layer may ask for, above 0; ``None``: all there is.
        sparse_weights: Use kernels for 2:4 sparse weights.
        version_compatible: The engine also runs on later minor versions.
        hardware_compatible: ``"AMPERE_PLUS"`` or ``"SAME_COMPUTE_CAPABILITY"``: the engine also runs on other GPUs.
        refit: Weights can be replaced afterwards.
        strip_weights: The engine carries no weights; it is refitted with them when it is opened.
        weight_streaming: Weights may stay in host memory.
        timing_cache: The folder of timings, which are read and added to: a file for each module, version and GPU
            (`tensorrt_child.timings_name`). TensorRT for RTX writes files without any in them. ``None``: none are kept.
        timeout_s: A build that takes longer is ended.
        memory_bytes: A build that holds more (resident) is ended; ``None``: no limit.
    """

    compute_capabilities: tuple[str, ...] = ()
    tf32: bool = False
    level: int | None = None
    workspace_bytes: int | None = None
    sparse_weights: bool = False
    version_compatible: bool = False
    hardware_compatible: str | None = None
    refit: bool = False
    strip_weights: bool = False
    weight_streaming: bool = False
    timing_cache: Path | None = None
    timeout_s: float = 1800.0
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.level is not None and not 0 <= self.level <= HIGHEST_LEVEL:
            raise RequestError("no such builder optimization level", self.level, f"Take 0 to {HIGHEST_LEVEL}")
        if self.workspace_bytes is not None and self.workspace_bytes <= 0:
            raise RequestError("no such workspace", self.workspace_bytes, "Give a number of bytes above 0")

    def to_dict(self) -> dict[str, Any]:
        """As the child reads them."""
        cache = None if self.timing_cache is None else str(self.timing_cache)
        return {**asdict(self), "timing_cache": cache}


@dataclass(frozen=True)
class EngineLayer:
    """One layer of a built engine.

    Attributes:
        name: As the builder names it, from the nodes that were fused.
        kind: ``gemm``, ``kgen`` (a generated kernel) …
        inputs: TensorRT's names of the inputs' element types: ``Float``, ``Half``, ``BFloat16``, ``Int8``, ``FP8``.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]

    @property
    def product(self) -> str | None:
        """The type that is multiplied, where the layer is a matrix product, a convolution or a whole attention.

        A product that is fused with what follows is called ``__myl_FcAdd…``; one that is fused with what comes before,
        as ``__myl_CastMulFc``, restores its input first and multiplies the wider type.
        """
        fused = self.kind == "runtime_fusion"
        if not self.inputs or not (fused or self.kind in PRODUCTS or self.name.startswith(ATTENTION)):
            return None
        if fused and not self.name.startswith("__myl_Fc"):
            return next((wide for wide in WIDE if wide in self.inputs), self.inputs[0])
        return self.inputs[0]


@dataclass(frozen=True)
class BuiltEngine:
    """What a build made.

    Attributes:
        plan: The serialized engine. It is native code.
        version: Of the library.
        seconds: What the builder took, parsing not included.
        bytes: Size of the plan.
        layers: In order of execution.
        warnings: The library's own, the first 40.
    """

    plan: Path
    version: str
    seconds: float
    bytes: int
    layers: tuple[EngineLayer, ...]
    warnings: tuple[str, ...] = ()


def profiles_of(signature: Signature, points: Sequence[Mapping[str, int]] = ()) -> list[Shapes]:
    """Optimization profiles over the whole envelope: one, or several where operating points lie far apart.

    Each spans every axis from its smallest to its largest length. They differ in the shapes that kernels are chosen
    for: of points whose work differs by a factor of 16 at most, the largest.

    Args:
        signature: The model's inputs and axes.
        points: Lengths by axis that matter; without any: the largest.
    """
    largest = {axis.name: axis.max for axis in signature.axes}
    ordered = sorted(points, key=_work) or [largest]
    least, groups = ordered[0], [ordered[0]]
    for point in ordered:
        if _work(point) <= FAR_APART * _work(least):
            groups[-1] = point
        else:
            least = point
            groups.append(point)
    return [
        {
            spec.name: (
                tuple(d if isinstance(d, int) else signature.axis(d).min for d in spec.shape),
                tuple(d if isinstance(d, int) else _within(signature, d, point) for d in spec.shape),
                tuple(d if isinstance(d, int) else signature.axis(d).max for d in spec.shape),
            )
            for spec in signature.inputs
        }
        for point in groups
    ]


def _work(point: Mapping[str, int]) -> int:
    product = 1
    for length in point.values():
        product *= length
    return product


def _within(signature: Signature, name: str, point: Mapping[str, int]) -> int:
    axis = signature.axis(name)
    return min(max(point.get(name, axis.max), axis.min), axis.max)


def build_engine(
    onnx: Path,
    plan: Path,
    *,
    module: str,
    profiles: Sequence[Shapes],
    options: EngineOptions | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> BuiltEngine:
    """Build an engine from an ONNX file, in a process of its own.

    Args:
        onnx: The file; external data lies beside it.
        plan: Where the engine is written.
        module: ``"tensorrt"`` or ``"tensorrt_rtx"``.
        profiles: See `profiles_of`.
        options: How it is built.
        on_progress: Called with what the builder does and the seconds since the start.

    Raises:
        OptionError: The installed version lacks an option.
        RequestError: The graph is refused: names the node and says what to do.
        EnvironmentLackError: The library is not installed, or the time or memory allowed did not suffice.
        NoSpaceError: The disk is full.
        InternalError: The library crashed.
    """
    options = options or EngineOptions()
    if not onnx.is_file():
        raise RequestError("there is no such ONNX file", onnx, "Check the path")
    if module == RTX and not options.compute_capabilities and not gpu()["available"]:
        raise RequestError("no GPU is named to build for, and there is none here", None, "Name some, as SM89 and SM120")
    with tempfile.TemporaryDirectory(prefix=".planish-engine-") as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked = {"parent": os.getpid(), "module": module, "onnx": str(onnx), "plan": str(plan), "profiles": profiles}
        gpus = options.compute_capabilities or [device["name"] for device in gpu()["devices"][:1] if device.get("name")]
        request.write_text(json.dumps({**asked, "gpus": gpus, "options": options.to_dict()}), encoding="utf-8")
        # The last line that it prints says why it crashed: TensorRT for RTX warns whenever timings are touched.
        command = [sys.executable, "-P", "-W", "ignore", tensorrt_child.__file__, str(request), str(answer)]
        with (Path(folder) / "errors.txt").open("w+b") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
            try:
                _attend(process, options, on_progress or (lambda text: None))
            finally:
                _end(process)
            if process.returncode or not answer.is_file():
                errors.seek(0)
                raise crashed(onnx, process.returncode, errors.read().decode(errors="replace"))
        told = json.loads(answer.read_text(encoding="utf-8"))
    if "errors" in told:
        raise explain(told, module, onnx)
    return BuiltEngine(
        plan,
        told["version"],
        told["seconds"],
        told["bytes"],
        tuple(EngineLayer(layer["name"], layer["kind"], tuple(layer["inputs"])) for layer in told["layers"]),
        tuple(told["warnings"]),
    )


def _attend(process: subprocess.Popen[bytes], options: EngineOptions, say: Callable[[str], None]) -> None:
    """Pass on what the builder says, until it ends or goes beyond its limits."""
    import psutil

    start = time.monotonic()
    state = {"text": "starting"}

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                found = json.loads(line)
                state["text"] = f"{found['phase']} {found['done']}/{found['of']}"
            except (ValueError, KeyError, TypeError):  # something else that the library printed
                continue

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    said = ""
    while True:
        try:
            process.wait(POLL_SECONDS)
            listener.join(timeout=5)
            return
        except subprocess.TimeoutExpired:
            pass
        elapsed = time.monotonic() - start
        if state["text"] != said:
            said = state["text"]
            say(f"{said}, {elapsed:.0f} s")
        if elapsed > options.timeout_s:
            raise EnvironmentLackError(
                "the engine was not built within the time allowed", f"{options.timeout_s:g} s", "Allow more time"
            )
        if options.memory_bytes is not None:
            try:
                held = psutil.Process(process.pid).memory_info().rss
            except psutil.Error:
                continue
            if held > options.memory_bytes:
                raise EnvironmentLackError(
                    "building the engine took more memory than is allowed",
                    f"{held / 1e6:,.0f} of {options.memory_bytes / 1e6:,.0f} MB",
                    "Allow more memory, or narrow the shape envelope",
                )


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


__all__ = [
    "RTX",
    "TENSORRT",
    "BuiltEngine",
    "EngineLayer",
    "EngineOptions",
    "OptionError",
    "Shapes",
    "build_engine",
    "explain",
    "profiles_of",
]
