"""The simulated GPU's own functions, and sessions on it: ONNX Runtime's, torch's, and engines of a fake TensorRT."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from exporter.artifact import Artifact, Axis, InputContract, Signature, TensorSpec, Variant
from exporter.targets import shape_cache
from exporter.targets.cuda import Cuda
from exporter.targets.graph_session import CudaSession, GraphSession
from exporter.targets.onnxruntime_cuda import OnnxRuntimeCuda
from exporter.targets.turns import Native, opening

WIDTH, LAYERS = 16, 6
PATIENCE = shape_cache.PATIENCE = 3
"""Much is captured in little time."""
CALLS = (
    "cudaStreamBeginCapture",
    "cudaGraphInstantiate",
    "cudaGraphLaunch",
    "cudaGraphExecDestroy",
    "cudaStreamCreateWithFlags",
    "cudaStreamDestroy",
)

OnnxRuntimeCuda.require = lambda self: None  # type: ignore[method-assign]  # it would look for NVIDIA's driver


class Gpu:
    """The simulated GPU's own functions."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcudart.so.13")
        self.library.simulated_held.restype = ctypes.c_size_t
        self.library.simulated_count.restype = ctypes.c_long

    def slow(self, call_us: int = 40, operation_us: int = 20, captured_us: int = 1500) -> None:
        """Make it slow, so that threads meet in many orders and captures last.

        Args:
            call_us: What a call takes at most.
            operation_us: What is given to a stream waits so long at most.
            captured_us: What it takes to record an operation.
        """
        self.library.simulated_delays(call_us, operation_us, captured_us)

    def refused(self) -> list[str]:
        """The calls that CUDA would have refused, or that would have been lost."""
        text = ctypes.create_string_buffer(1 << 20)
        self.library.simulated_refused(text, len(text))
        return text.value.decode().splitlines()

    def counts(self) -> dict[str, int]:
        return {call: self.library.simulated_count(call.encode()) for call in CALLS}

    def held(self) -> int:
        """Bytes of its memory that are allocated."""
        return int(self.library.simulated_held())


GPU = Gpu()


class Products:
    """A model of products of matrices: `y = x w0 w1 …`."""

    def __init__(self) -> None:
        import onnx

        numbers = np.random.default_rng(0)
        self.weights = [(0.3 * numbers.standard_normal((WIDTH, WIDTH))).astype(np.float32) for _ in range(LAYERS)]
        names = ["x", *(f"h{layer}" for layer in range(1, LAYERS)), "y"]
        body = " ".join(f"{names[i + 1]} = MatMul({names[i]}, w{i})" for i in range(LAYERS))
        model = onnx.parser.parse_model(
            f'<ir_version: 9, opset_import: ["" : 20]> g (float[n, {WIDTH}] x) => (float[n, {WIDTH}] y) {{ {body} }}'
        )
        model.graph.initializer.extend(onnx.numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(self.weights))
        self._folder = TemporaryDirectory()
        path = Path(self._folder.name) / "model.onnx"
        onnx.save(model, path)
        spec = ("float32", ("batch", WIDTH))
        signature = Signature((TensorSpec("x", *spec),), (TensorSpec("y", *spec),), (Axis("batch", 1, 64),))
        self.artifact = Artifact(path, "onnx", signature, InputContract())

    def inputs(self, numbers: np.random.Generator, batch: int) -> dict[str, np.ndarray]:
        return {"x": numbers.standard_normal((batch, WIDTH)).astype(np.float32)}

    def error(self, inputs: dict[str, np.ndarray], outputs: dict[str, Any]) -> float:
        wanted = inputs["x"]
        for weight in self.weights:
            wanted = wanted @ weight
        error = float(np.abs(np.asarray(outputs["y"]) - wanted).max())
        return error if error == error else float("inf")


class ProductsInTorch(CudaSession):
    """The same model in torch, as a session of a runtime that works on torch's tensors."""

    def __init__(self, model: Products) -> None:
        import torch

        super().__init__(model.artifact, Cuda())
        self._native = Weights([torch.from_numpy(weight).to("cuda") for weight in model.weights])

    def executed(self) -> dict[str, Any]:
        return {"cuda_graphs": self.graphs()}


class Weights:
    def __init__(self, weights: list[Any]) -> None:
        self._native = Native(weights=weights)

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        import torch

        found = inputs["x"]
        for weight in self._native.weights:
            found = torch.mm(found, weight)
        return {"y": found}


class Affine:
    """An engine of a fake TensorRT that computes on the simulated GPU: `y = 2 x + 1` and the sum of each row of x."""

    def __init__(self) -> None:
        from tests.exporter.targets import fake_tensorrt

        fake_tensorrt.CONTEXT = _engine_context()
        sys.modules["tensorrt"] = fake_tensorrt.module("tensorrt")
        x, total = ("float32", ("batch", WIDTH)), ("float32", ("batch",))
        ranges = [{"x": [[low, WIDTH], [usual, WIDTH], [64, WIDTH]]} for low, usual in ((1, 2), (4, 32))]
        self._folder = TemporaryDirectory()
        path = Path(self._folder.name) / "model.plan"
        path.write_bytes(fake_tensorrt.plan("affine", {"x": x}, {"y": x, "total": total}, ranges))
        outputs = (TensorSpec("y", *x), TensorSpec("total", *total))
        self.artifact = Artifact(
            path, "tensorrt", Signature((TensorSpec("x", *x),), outputs, (Axis("batch", 1, 64),)), InputContract()
        )

    def inputs(self, numbers: np.random.Generator, batch: int) -> dict[str, np.ndarray]:
        return {"x": numbers.standard_normal((batch, WIDTH)).astype(np.float32)}

    def error(self, inputs: dict[str, np.ndarray], outputs: dict[str, Any]) -> float:
        x = inputs["x"]
        wanted = {"y": 2 * x + 1, "total": x.sum(1)}
        error = max(float(np.abs(outputs[name] - value).max()) for name, value in wanted.items())
        return error if error == error else float("inf")


def _engine_context() -> type[Any]:
    from tests.exporter.targets.fake_tensorrt import FakeContext

    class SimulatedContext(FakeContext):
        def execute_async_v3(self, stream_handle: int) -> bool:
            rows, width = self._shapes["x"]
            addresses = [ctypes.c_void_p(self._addresses[name]) for name in ("x", "y", "total")]
            sizes = ctypes.c_size_t(rows), ctypes.c_size_t(width)
            failed = GPU.library.simulated_affine(ctypes.c_void_p(stream_handle), *addresses, *sizes)
            return failed == 0 or self._refuse(f"CUDA error {failed}")

        def _stream(self, handle: int) -> bool:
            return handle != 0 or self._refuse("the legacy stream waits for others")

    return SimulatedContext


MODELS: dict[str, Callable[[], Any]] = {"onnxruntime": Products, "torch": Products, "tensorrt": Affine}


def open_session(model: Any, kind: str) -> GraphSession:
    if kind == "torch":
        with opening():
            return ProductsInTorch(model)
    if kind == "tensorrt":
        from exporter.targets.tensorrt_session import TensorRtSession

        with opening():
            return TensorRtSession(model.artifact, "tensorrt", "fp32")
    session = OnnxRuntimeCuda().open(model.artifact, Variant("onnxruntime-cuda", "fp32"), threads=1)
    assert isinstance(session, GraphSession)
    return session
