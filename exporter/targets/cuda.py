"""An NVIDIA GPU as sessions use it, over torch: buffers, copies, captured graphs, the device's own clock."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from exporter.errors import EnvironmentLackError
from exporter.targets.base import Array
from exporter.targets.turns import TURNS, Native

WARM_RUNS = 3
"""Runs before a capture: libraries choose kernels and make room in the first ones."""


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

        with TURNS.capturing():
            beside, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
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
    """A graph that torch captured. It may be let go anywhere, amid another capture too."""

    def __init__(self, graph: Any) -> None:
        self._native = Native(graph=graph)

    def replay(self) -> None:
        self._native.graph.replay()


def _writeable(array: Array) -> Array:
    return array if array.flags.writeable else array.copy()  # torch refuses memory that is read-only
