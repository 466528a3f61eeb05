"""Sessions on an NVIDIA GPU whose runs are captured as CUDA graphs, for the shapes that come often."""

from __future__ import annotations

import os
import threading
from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from exporter.artifact import Artifact
from exporter.errors import RequestError, first_line
from exporter.targets.base import Array, Binding, DeviceBinding, Session, check_inputs
from exporter.targets.cuda import Cuda
from exporter.targets.shape_cache import ShapeCache
from exporter.targets.turns import TURNS, frees

MOST_GRAPHS = 8
"""Shapes that a session holds a captured graph for, of those that `Session.run` meets."""

SWITCH = "PLANISH_CUDA_GRAPHS"
"""The environment variable that, with the value 0, keeps sessions from capturing."""

Call = Callable[[dict[str, Any]], dict[str, Any]]


class GraphBinding(DeviceBinding):
    """A binding that can be given other inputs of the same shapes."""

    @abstractmethod
    def refill(self, arrays: Mapping[str, Array]) -> None:
        """Other inputs of the same shapes, from the next run on."""


class CudaBinding(GraphBinding):
    """Inputs of one call on the device: captured as a graph where that is possible, else given anew at each run.

    Args:
        device: The GPU.
        call: Takes the inputs by name and returns the outputs by name, on the device.
        inputs: The inputs, on the device (`Cuda.put`).
        capture: Try to capture it.
    """

    def __init__(self, device: Cuda, call: Call, inputs: dict[str, Any], *, capture: bool) -> None:
        self._device = device
        self._call = call
        self._inputs = inputs
        self._results: dict[str, Any] | None = None
        self._replay: Callable[[], None] | None = None
        self._captured: dict[str, Any] = {}  # what each replay writes to: nothing has yet, when it is captured
        self.refusal = ""
        """Why it could not be captured."""
        if capture:
            try:
                self._replay, self._captured = device.capture(lambda: call(self._inputs))
            except RuntimeError as error:
                self.refusal = first_line(error)

    @property
    def captured(self) -> bool:
        return self._replay is not None

    def refill(self, arrays: Mapping[str, Array]) -> None:
        self._device.refill(self._inputs, arrays)

    def launch(self) -> None:
        if self._replay is not None:
            self._replay()
            self._results = self._captured
        else:
            self._results = self._call(self._inputs)

    def wait(self) -> None:
        self._device.wait()

    def queued_seconds(self, runs: int) -> float:
        return self._device.queued_seconds(self.launch, runs)

    def outputs(self) -> dict[str, Any]:
        if self._results is None:
            raise RequestError("outputs were asked for before the first run", None, "Call run() first")
        return {name: tensor.detach() for name, tensor in self._results.items()}

    def host_outputs(self) -> dict[str, Array]:
        return self._device.host(self.outputs())


class GraphSession(Session):
    """A session on the GPU whose `run` captures a graph for shapes that come often.

    The others are launched kernel by kernel, which takes the host longer than the device where a model is small. One
    run at a time: the buffers of a shape are shared. Sessions of a process may run in several threads, and be let go in
    any; what somebody bound must not be run while another thread binds, or runs a session of ONNX Runtime.

    Subclasses set `_native` to what the runtime opened, which holds it in `exporter.targets.turns.Native`.

    Attributes:
        refusal: Why runs are not captured; empty where they are.
    """

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact)
        self.refusal = f"{SWITCH} is 0" if os.environ.get(SWITCH) == "0" else ""
        self._often: ShapeCache[GraphBinding] = ShapeCache(MOST_GRAPHS)
        self._native: Any = None
        self._frees = frees()
        self._lock = threading.Lock()
        self._closed = False

    def bind(self, inputs: Mapping[str, Any]) -> Binding:
        self._check_open()
        return super().bind(inputs)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        arrays = check_inputs(inputs, self.artifact.signature, self.artifact.contract)
        with self._lock:
            self._check_open()
            shapes: Hashable = tuple((name, array.shape) for name, array in arrays.items())
            binding = None if self.refusal else self._often.find(shapes, lambda: self._bind(arrays))
            with TURNS.working():
                if binding is None:
                    binding = self._bind_once(arrays)
                else:
                    binding.refill(arrays)
                binding.launch()
                return binding.host_outputs()

    @abstractmethod
    def _bind(self, arrays: dict[str, Array]) -> GraphBinding:
        """Bind, and capture where that is possible."""

    @abstractmethod
    def _bind_once(self, arrays: dict[str, Array]) -> GraphBinding:
        """Bind for a single run, of which it takes the turn."""

    def graphs(self) -> str:
        """For `executed`: whether runs are captured, and why not where they are not."""
        return f"not captured: {self.refusal}" if self.refusal else "captured"

    def close(self) -> None:
        """Take no more runs. It waits for nobody, so that finalizers may call it.

        What it has on the GPU is freed after a run that is going on, when nobody captures, and when what was bound is
        let go; at the latest before another one is opened.
        """
        self._closed = True
        self._frees.give(self._drop)

    def _drop(self) -> None:
        if TURNS.ended:  # who runs it may never come back, and the process takes all of it along
            return
        with self._lock:
            self._often.held.clear()
            self._native = None

    def _opened(self) -> Any:
        """What the runtime opened. Who keeps it can go on after the session is closed."""
        native = self._native  # read first: it is let go after the session was closed
        self._check_open()
        return native

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError("the session is closed", self.artifact.path, "Open it again")


class CudaSession(GraphSession):
    """A session of a runtime that works on torch's tensors and streams.

    What subclasses set `_native` to takes inputs by name and gives outputs by name, on the device, without waiting.
    """

    def __init__(self, artifact: Artifact, device: Cuda) -> None:
        super().__init__(artifact)
        self.device = device

    def call_to_capture(self) -> Call:
        """What a graph is captured of. It must not lead back to the session."""
        native: Call = self._opened()
        return native

    def _bind(self, arrays: dict[str, Array]) -> CudaBinding:
        with TURNS.working():
            call, inputs = self.call_to_capture(), self.device.put(arrays)
        binding = CudaBinding(self.device, call, inputs, capture=not self.refusal)
        self.refusal = self.refusal or binding.refusal
        return binding

    def _bind_once(self, arrays: dict[str, Array]) -> CudaBinding:
        return CudaBinding(self.device, self._opened(), self.device.put(arrays), capture=False)
