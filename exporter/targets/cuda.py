"""An NVIDIA GPU as sessions use it, over torch: buffers, copies, captured graphs, the device's own clock."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
import weakref
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, TypeVar

from exporter.artifact import Artifact
from exporter.errors import EnvironmentLackError, RequestError, first_line
from exporter.targets.base import Array, Binding, DeviceBinding, Session, check_inputs
from exporter.targets.own_thread import OwnThread
from exporter.targets.shape_cache import ShapeCache

MOST_GRAPHS = 8
"""Shapes that a session holds a captured graph for, of those that `Session.run` meets."""
WARM_RUNS = 3
"""Runs before a capture: libraries choose kernels and make room in the first ones."""

SWITCH = "PLANISH_CUDA_GRAPHS"
"""The environment variable that, with the value 0, keeps sessions from capturing."""

T = TypeVar("T")
Call = Callable[[dict[str, Any]], dict[str, Any]]


class Turns:
    """Who works on the GPU in this process, many at a time, and who captures: alone.

    While ONNX Runtime captures, no other thread may allocate or wait (CUDA's global mode of capturing): both would
    fail. Who captures waits until nobody works and holds back who comes meanwhile. A thread that works cannot capture.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._working = self._waiting = 0
        self._captures = False

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Work, beside others."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._captures)
            self._working += 1
        try:
            yield
        finally:
            with self._changed:
                self._working -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """Capture, alone."""
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: not self._working and not self._captures)
            self._waiting -= 1
            self._captures = True
        try:
            yield
        finally:
            with self._changed:
                self._captures = False
                self._changed.notify_all()


TURNS = Turns()


@functools.cache
def _frees() -> OwnThread:
    """Who waits for a turn to free what nobody holds any more."""
    return OwnThread("planish-frees")


def free_in_turn(owner: object, held: list[Any]) -> None:
    """What the owner holds on the GPU is to be freed when it is collected: later, in a turn and in a thread for that.

    The owner may be let go anywhere, amid a capture too. To free something on the GPU then would spoil the capture, and
    to destroy a graph that ONNX Runtime captured ends the process
    (https://github.com/microsoft/onnxruntime/pull/32081).

    Args:
        owner: Who is the only one to use it.
        held: The last references to it that there will be, beside those of the owner. They must not lead back to the
            owner. Emptied by the owner's own `close`, there is nothing to free.
    """
    weakref.finalize(owner, _frees().give, functools.partial(_free, held)).atexit = False


def _free(held: list[Any]) -> None:
    with TURNS.working():
        held.clear()


class Cuda:
    """The first GPU. FP32 is FP32 in this process from now on: neither products nor convolutions round to TF32.

    Raises:
        EnvironmentLackError: torch has no CUDA, or finds no GPU.
    """

    def __init__(self) -> None:
        import torch

        if torch.version.cuda is None:
            raise EnvironmentLackError("torch was built without CUDA", torch.__version__, "Install a CUDA build of it")
        if not torch.cuda.is_available():
            raise EnvironmentLackError(
                "torch finds no GPU", f"torch {torch.__version__}", "nvidia-smi shows the driver"
            )
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False  # torch lets convolutions round unless it is told otherwise
        self.name = torch.cuda.get_device_name(0)
        self._stream = torch.cuda.Stream()

    @contextlib.contextmanager
    def beside(self) -> Iterator[int]:
        """A stream of its own, between what was given to the device before and what is given to it after; its handle.

        While something is captured that is the stream on which it is.
        """
        import torch

        current = torch.cuda.current_stream()
        if current != torch.cuda.default_stream():
            yield int(current.cuda_stream)
            return
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield int(self._stream.cuda_stream)
        current.wait_stream(self._stream)

    def put(self, arrays: Mapping[str, Array]) -> dict[str, Any]:
        """Copies of host arrays on the device."""
        import torch

        return {name: torch.from_numpy(_writeable(array)).to("cuda") for name, array in arrays.items()}

    def refill(self, tensors: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        """Copy host arrays over tensors of the same shapes."""
        import torch

        for name, array in arrays.items():
            tensors[name].copy_(torch.from_numpy(_writeable(array)), non_blocking=True)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """A tensor on the device; NumPy's name of the type."""
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device="cuda")

    def view(self, buffer: Any, shape: tuple[int, ...], dtype: str) -> Any:
        """A copy of what a buffer of bytes begins with, as a tensor."""
        import torch

        kind = getattr(torch, dtype)
        elements = math.prod(shape)
        if elements == 0:
            return torch.empty(shape, dtype=kind, device=buffer.device)
        return buffer[: elements * kind.itemsize].view(kind).reshape(shape).clone()

    def host(self, tensors: Mapping[str, Any]) -> dict[str, Array]:
        """Host copies, through pinned memory, of what the device has computed when all it was given is done."""
        import torch

        copies = {}
        for name, tensor in tensors.items():
            copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            copies[name].copy_(tensor, non_blocking=True)
        self.wait()
        return {name: copy.numpy() for name, copy in copies.items()}

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Record what `call` gives the device, to give it all of it at once from then on.

        Returns:
            What replays it, and what `call` returned: its tensors hold the outputs of the last replay.

        Raises:
            RuntimeError: Something in it cannot be captured, such as a result that the host waits for.
        """
        import torch

        beside, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with TURNS.capturing():
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(WARM_RUNS):
                    call()
            torch.cuda.current_stream().wait_stream(beside)
            # Threads that know nothing of turns, such as the user's own, may go on allocating and copying meanwhile.
            with torch.cuda.graph(graph, stream=beside, capture_error_mode="thread_local"):
                results = call()
        return _Graph(graph).replay, results

    def capturing(self) -> bool:
        """Whether what is given to the device now is recorded, and not done."""
        import torch

        return bool(torch.cuda.is_current_stream_capturing())

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        import torch

        torch.cuda.current_stream().synchronize()

    def queued_seconds(self, launch: Callable[[], None], runs: int) -> float:
        """By events around so many launches one after the other, per launch."""
        import torch

        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(runs):
            launch()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / runs


class _Graph:
    """A graph that torch captured."""

    def __init__(self, graph: Any) -> None:
        self._held = [graph]
        free_in_turn(self, self._held)

    def replay(self) -> None:
        self._held[0].replay()


def _writeable(array: Array) -> Array:
    return array if array.flags.writeable else array.copy()  # torch refuses memory that is read-only


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

    Attributes:
        refusal: Why runs are not captured; empty where they are.
    """

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact)
        self.refusal = f"{SWITCH} is 0" if os.environ.get(SWITCH) == "0" else ""
        self._often: ShapeCache[GraphBinding] = ShapeCache(MOST_GRAPHS)
        self._held: list[Any] = []
        free_in_turn(self, self._held)
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
        with self._lock, TURNS.working():
            if not self._closed:
                self._closed = True
                self._often.held.clear()
                self._forget()
                self._held.clear()
        _frees().run(lambda: None)  # what was captured is free too when this returns

    def _hold(self, native: T) -> T:
        """Keep something that the runtime has on the GPU until the session is closed or collected."""
        self._held.append(native)
        return native

    @abstractmethod
    def _forget(self) -> None:
        """Let go all that was given to `_hold`."""

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError("the session is closed", self.artifact.path, "Open it again")


class CudaSession(GraphSession):
    """A session of a runtime that works on torch's tensors and streams."""

    def __init__(self, artifact: Artifact, device: Cuda) -> None:
        super().__init__(artifact)
        self.device = device

    @abstractmethod
    def call(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs by name to outputs by name, on the device, without waiting."""

    def call_to_capture(self) -> Call:
        """What a graph is captured of: `call`, or one like it that no other binding shares."""
        return self.call

    def _bind(self, arrays: dict[str, Array]) -> CudaBinding:
        with TURNS.working():
            call, inputs = self.call_to_capture(), self.device.put(arrays)
        binding = CudaBinding(self.device, call, inputs, capture=not self.refusal)
        self.refusal = self.refusal or binding.refusal
        return binding

    def _bind_once(self, arrays: dict[str, Array]) -> CudaBinding:
        return CudaBinding(self.device, self.call, self.device.put(arrays), capture=False)
