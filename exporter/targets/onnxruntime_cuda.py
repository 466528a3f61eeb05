"""ONNX Runtime's CUDA provider: portable ONNX and the fused form, inputs and outputs on the GPU, runs captured."""

from __future__ import annotations

import itertools
import re
import time
import weakref
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from exporter.artifact import Artifact, Variant
from exporter.errors import EnvironmentLackError, RequestError, first_line, missing_package
from exporter.targets.base import (
    PLAINLY,
    Array,
    BuildHow,
    Session,
    output_shapes,
    register_target,
)
from exporter.targets.cuda import WARM_RUNS
from exporter.targets.graph_session import GraphBinding, GraphSession
from exporter.targets.nvidia import NvidiaTarget
from exporter.targets.own_thread import OwnThread
from exporter.targets.turns import TURNS, Native, opening

if TYPE_CHECKING:
    import onnxruntime

CUDA_PROVIDER = "CUDAExecutionProvider"
NOT_CAPTURED = -1
"""The number of a graph that ONNX Runtime does not capture."""


class OnnxRuntimeCudaBinding(GraphBinding):
    """Inputs and outputs of one ONNX Runtime session on the GPU, bound through its I/O binding.

    Args:
        opened: Holds the runtime's session.
        artifact: Whose signature says what the outputs are.
        arrays: The inputs.
        number: Of the graph that runs are captured as; `NOT_CAPTURED`: none.
        once: It is let go in the turn in which it is made.
    """

    def __init__(
        self, opened: Native, artifact: Artifact, arrays: Mapping[str, Array], number: int, *, once: bool = False
    ) -> None:
        import onnxruntime as ort

        self._names = [spec.name for spec in artifact.signature.outputs]
        binding, make = opened.session.io_binding(), ort.OrtValue
        inputs = {name: make.ortvalue_from_numpy(array, "cuda", 0) for name, array in arrays.items()}
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        shapes = output_shapes(artifact.signature, dict(arrays))
        outputs: dict[str, Any] = {}
        for spec in artifact.signature.outputs:
            shape = shapes[spec.name]
            if shape is None:
                binding.bind_output(spec.name, "cuda")
                number = NOT_CAPTURED  # where it lies is known after the run
                continue
            outputs[spec.name] = make.ortvalue_from_shape_and_type(shape, np.dtype(spec.dtype), "cuda", 0)
            binding.bind_ortvalue_output(spec.name, outputs[spec.name])
        # Freed in this order: the session last.
        hold = SimpleNamespace if once else Native
        self._native: Any = hold(binding=binding, inputs=inputs, outputs=outputs, opened=opened)
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(number))
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if number != NOT_CAPTURED:
            for _ in range(WARM_RUNS):
                self.run()

    def refill(self, arrays: Mapping[str, Array]) -> None:
        for name, array in arrays.items():
            self._native.inputs[name].update_inplace(array)

    def launch(self) -> None:
        self._native.opened.session.run_with_iobinding(self._native.binding, self._options)

    def wait(self) -> None:
        self._native.binding.synchronize_outputs()

    def queued_seconds(self, runs: int) -> float:
        self.wait()
        begin = time.perf_counter()
        for _ in range(runs):
            self.launch()
        self.wait()
        return (time.perf_counter() - begin) / runs

    def outputs(self) -> dict[str, Any]:
        if len(self._native.outputs) == len(self._names):
            return dict(self._native.outputs)
        return dict(zip(self._names, self._native.binding.get_outputs(), strict=True))

    def host_outputs(self) -> dict[str, Array]:
        self.wait()
        return {name: np.array(value.numpy()) for name, value in self.outputs().items()}


class OnnxRuntimeCudaSession(GraphSession):
    """An ONNX file opened by ONNX Runtime on the GPU. One run at a time.

    ONNX Runtime keeps what it captured by thread: another thread that runs the same binding captures it again, in the
    middle of what others do. So `run` works in one thread, the session's own, whoever calls it. What somebody bound is
    captured in the thread that bound it, and is to be run there. It keeps ONNX Runtime's session, closed or not, and
    the session keeps what was captured: bind a shape once, not once per call.
    """

    def __init__(self, artifact: Artifact, precision: str, threads: int) -> None:
        super().__init__(artifact)
        self._precision, self._threads = precision, threads
        self._numbers = itertools.count(1)
        try:
            self._reopen(capture=not self.refusal)
        except RequestError as error:
            if self.refusal:
                raise
            # Where ONNX Runtime would have to leave operators to the processor it captures nothing.
            self._reopen(capture=False)
            self.refusal = str(error.remedy or error.what)
        self._thread = OwnThread("planish-onnxruntime-cuda")
        weakref.finalize(self, self._thread.stop).atexit = False

    def _reopen(self, *, capture: bool) -> None:
        self._native = Native(session=open_cuda_session(self.artifact.path, self._threads, capture=capture))

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        return self._thread.do(partial(super().run, inputs))

    def _bind(self, arrays: dict[str, Array]) -> OnnxRuntimeCudaBinding:
        with TURNS.capturing():
            if not self.refusal:
                try:
                    return OnnxRuntimeCudaBinding(self._opened(), self.artifact, arrays, next(self._numbers))
                except RequestError:
                    raise
                except Exception as error:  # ONNX Runtime has no common base class for its errors
                    # What uses the GPU in this process without taking turns disturbs a capture, and a session whose
                    # capture failed fails from then on: another one goes on without.
                    self.refusal = cuda_failure(error)
                self._often.held.clear()
                self._reopen(capture=False)
            return OnnxRuntimeCudaBinding(self._opened(), self.artifact, arrays, NOT_CAPTURED)

    def _bind_once(self, arrays: dict[str, Array]) -> OnnxRuntimeCudaBinding:
        return OnnxRuntimeCudaBinding(self._opened(), self.artifact, arrays, NOT_CAPTURED, once=True)

    def executed(self) -> dict[str, Any]:
        import onnxruntime as ort

        inference = self._opened().session
        return {
            "runtime": f"onnxruntime {ort.__version__}",
            "device": "cuda",
            "provider": inference.get_providers()[0],
            "precision": self._precision,
            "nodes": dict(nodes_by_provider(inference)),
            "cuda_graphs": self.graphs(),
        }


def open_cuda_session(path: Path, threads: int, *, capture: bool) -> onnxruntime.InferenceSession:
    """Open an ONNX file on ONNX Runtime's CUDA provider, and make sure that it is the CUDA provider that runs it.

    Args:
        path: The ONNX file; external data lies beside it.
        threads: Threads of what the processor does.
        capture: Capture runs as CUDA graphs.

    Raises:
        RequestError: The file cannot be opened, or not captured; the remedy holds ONNX Runtime's words.
        EnvironmentLackError: ONNX Runtime has no CUDA provider that works, and took another one.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        raise missing_package("onnxruntime-gpu", "gpu") from None
    if hasattr(ort, "preload_dlls"):  # CUDA's and cuDNN's libraries from Python packages, where they are
        ort.preload_dlls()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # FP32 is FP32: without this products are rounded to ten bits of mantissa.
    settings = {"device_id": "0", "use_tf32": "0", "enable_cuda_graph": "1" if capture else "0"}
    told, session = "", None
    try:
        session = ort.InferenceSession(str(path), options, providers=[(CUDA_PROVIDER, settings)])
    except Exception as error:  # ONNX Runtime has no common base class for its errors
        told = first_line(error)  # the error leads to what was half opened, which is let go here, in the turn
    if session is None:
        raise RequestError("ONNX Runtime cannot open the model on the GPU", path, told)
    found = session.get_providers()
    if found[0] != CUDA_PROVIDER:
        raise EnvironmentLackError(
            "ONNX Runtime does not run on the GPU",
            f"{', '.join(found)} instead",
            "onnxruntime-gpu needs CUDA 13 and cuDNN 9 libraries: docs/nvidia.md says how to install them",
        )
    return session


def cuda_failure(error: BaseException) -> str:
    """What CUDA said, out of what ONNX Runtime makes of it: first come the names of its own functions, for lines."""
    found = re.search(r"CUDA failure \d+: [^;\n]+", str(error))
    return found[0].strip() if found else first_line(error)


def nodes_by_provider(session: onnxruntime.InferenceSession) -> Counter[str]:
    """How many nodes ONNX Runtime gave to which provider; empty where this version does not tell."""
    try:
        parts = session.get_provider_graph_assignment_info()
    except (AttributeError, RuntimeError):
        return Counter()
    placed: Counter[str] = Counter()
    for part in parts:
        placed[part.ep_name] += len(part.get_nodes())
    return placed


@register_target
class OnnxRuntimeCuda(NvidiaTarget):
    """ONNX Runtime's CUDA provider."""

    name = "onnxruntime-cuda"
    consumes = "onnx"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "bf16")
    packages = ("onnxruntime-gpu",)
    install = "pip install 'planish[gpu]' in an environment without onnxruntime"

    def build(self, artifact: Artifact, variant: Variant, folder: Path, how: BuildHow = PLAINLY) -> list[Path]:
        return []

    def open(
        self, artifact: Artifact, variant: Variant, *, threads: int, trusted_digests: frozenset[str] = frozenset()
    ) -> Session:
        self.require()
        with opening():
            return OnnxRuntimeCudaSession(artifact, variant.precision, threads)
