"""A fake of `exporter.targets.cuda.Cuda`: memory of the host stands for the GPU's, and everything is done at once.

It keeps what a GPU would not forgive: what is captured is not done, and what waits or copies to the host cannot be
captured. What it gave out as memory it knows, so that a fake of a library can refuse other addresses.
"""

from __future__ import annotations

import contextlib
import math
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from exporter.targets.cuda import WARM_RUNS

SIDE_STREAM, CAPTURED_STREAM = 0x51DE, 0xCA97
"""Handles of the streams that `FakeCuda.beside` gives."""
UNWRITTEN = 0xAB
"""What the bytes of memory are that nobody has written to."""


class FakeMemory:
    """What has been given out, as long as somebody holds it."""

    def __init__(self) -> None:
        self._given: list[weakref.ref[torch.Tensor]] = []

    def give(self, tensor: torch.Tensor) -> torch.Tensor:
        self._given = [ref for ref in self._given if ref() is not None]
        self._given.append(weakref.ref(tensor))
        return tensor

    def holds(self, address: int, size: int) -> bool:
        """Whether so many bytes from an address on are within one tensor that is still held."""
        for ref in self._given:
            tensor = ref()
            if tensor is None:
                continue
            begin, bytes_held = tensor.data_ptr(), tensor.numel() * tensor.element_size()
            if begin <= address and address + size <= begin + bytes_held:
                return True
        return False


MEMORY = FakeMemory()
"""That of the one fake GPU."""


class FakeCuda:
    """The interface of `Cuda` without a GPU.

    Args:
        refusal: With it every capture fails, for that reason.
    """

    def __init__(self, refusal: str = "") -> None:
        self.name = "fake GPU"
        self.refusal = refusal
        self.captures: list[Callable[[], Any]] = []
        """The calls that have been captured."""
        self.replays = 0
        self._recording = False

    @contextlib.contextmanager
    def beside(self) -> Iterator[int]:
        yield CAPTURED_STREAM if self._recording else SIDE_STREAM

    def put(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        self._not_recorded()
        return {name: MEMORY.give(torch.tensor(array)) for name, array in arrays.items()}

    def refill(self, tensors: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        self._not_recorded()
        for name, array in arrays.items():
            assert tensors[name].shape == array.shape
            tensors[name].copy_(torch.tensor(array))

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        kind = getattr(torch, dtype)
        unwritten = torch.full((math.prod(shape) * kind.itemsize,), UNWRITTEN, dtype=torch.uint8)
        tensor = unwritten.view(kind).reshape(shape) if unwritten.numel() else torch.empty(shape, dtype=kind)
        return MEMORY.give(tensor)

    def view(self, buffer: Any, shape: tuple[int, ...], dtype: str) -> Any:
        kind = getattr(torch, dtype)
        size = math.prod(shape) * kind.itemsize
        assert size <= buffer.numel()
        if size == 0:
            return MEMORY.give(torch.empty(shape, dtype=kind))
        return MEMORY.give(buffer[:size].clone().view(kind).reshape(shape))

    def host(self, tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
        self.wait()
        return {name: tensor.clone().numpy() for name, tensor in tensors.items()}

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        for _ in range(WARM_RUNS):
            call()
        if self.refusal:
            raise RuntimeError(self.refusal)
        self._recording = True
        try:
            recorded = call()
        finally:
            self._recording = False
        self.captures.append(call)
        results = {name: self.empty(tuple(t.shape), str(t.dtype).split(".")[1]) for name, t in recorded.items()}

        def replay() -> None:
            self.replays += 1
            for name, tensor in call().items():
                results[name].copy_(tensor)

        return replay, results

    def capturing(self) -> bool:
        return self._recording

    def wait(self) -> None:
        self._not_recorded()

    def queued_seconds(self, launch: Callable[[], None], runs: int) -> float:
        begin = time.perf_counter()
        for _ in range(runs):
            launch()
        return (time.perf_counter() - begin) / runs

    def _not_recorded(self) -> None:
        if self._recording:
            raise RuntimeError("fake CUDA error: operation not permitted when stream is capturing")
