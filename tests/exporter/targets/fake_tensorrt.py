"""A fake of the half of TensorRT's Python API that runs engines. It computes, through the addresses that it is given.

A plan is JSON (`plan`). As the real library does, it answers a wrong call with ``False`` or ``None`` and tells its
logger why: shapes that are not set or that the profile does not hold, addresses that are missing or that are no memory
of the GPU. What was set for one profile does not count for another. `test_tensorrt_api` compares its names and their
arguments with those of NVIDIA's bindings.
"""

from __future__ import annotations

import ctypes
import enum
import json
import math
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from tests.exporter.targets.fake_cuda import CAPTURED_STREAM, MEMORY, SIDE_STREAM

VERSION = "99.1"


def _affine(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    x = inputs["x"]
    return {"y": 2 * x + 1, "total": x.sum(1, dtype=np.float32)}


def _found(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    x = inputs["x"]
    return {"y": 2 * x + 1, "found": np.argwhere(x > 0).astype(np.int64)}


def _lookup(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"y": (10 * inputs["ids"] * inputs["mask"]).astype(np.float32)}


KERNELS: dict[str, Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]] = {
    "affine": _affine,
    "found": _found,
    "lookup": _lookup,
}
"""What an engine can compute."""


def plan(
    kernel: str,
    inputs: Mapping[str, Sequence[Any]],
    outputs: Mapping[str, Sequence[Any]],
    profiles: Sequence[Mapping[str, Sequence[Sequence[int]]]],
    **more: Any,
) -> bytes:
    """A serialized engine.

    Args:
        kernel: Of `KERNELS`.
        inputs: By name, the element type and the shape, dynamic dimensions by name.
        outputs: The same; a dimension that no input has depends on the values.
        profiles: By input, the smallest, the usual and the largest shape.
        more: ``host_code``: it brings code for the host; ``fails``: it cannot be run, for that reason; ``contexts``:
            most execution contexts that it makes; ``shape_inputs``: inputs whose values are shapes.
    """
    content = {"kernel": kernel, "inputs": inputs, "outputs": outputs, "profiles": profiles, **more}
    return json.dumps(content).encode()


class FakeSeverity(enum.Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class FakeLogger:
    Severity = FakeSeverity
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = FakeSeverity

    def __init__(self) -> None:
        self._made = True

    def log(self, severity: FakeSeverity, msg: str) -> None:
        raise NotImplementedError("a logger defines this")


class FakeOutputAllocator:
    def __init__(self) -> None:
        self._made = True

    def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:
        raise NotImplementedError("an allocator defines this")

    def reallocate_output_async(self, tensor_name: str, memory: int, size: int, alignment: int, stream: int) -> int:
        raise NotImplementedError("an allocator defines this")

    def notify_shape(self, tensor_name: str, shape: FakeDims) -> None:
        raise NotImplementedError("an allocator defines this")


class FakeDims:
    """A sequence of lengths, but no tuple."""

    def __init__(self, shape: Sequence[int]) -> None:
        self._shape = list(shape)

    def __len__(self) -> int:
        return len(self._shape)

    def __getitem__(self, index: int) -> int:
        return self._shape[index]


class FakeMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class FakeDataType(enum.Enum):
    FLOAT = "float32"
    HALF = "float16"
    INT64 = "int64"
    INT32 = "int32"
    BOOL = "bool"


class FakeRuntime:
    def __init__(self, logger: FakeLogger) -> None:
        assert isinstance(logger, FakeLogger)
        assert logger._made, "pybind11 wants the base class to be initialised"
        self.engine_host_code_allowed = False
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> FakeEngine | None:
        self._logger.log(FakeSeverity.INFO, f"Loaded engine size: {len(serialized_engine)} B")
        try:
            content = json.loads(serialized_engine)
        except ValueError:
            self._logger.log(FakeSeverity.ERROR, "fake Error Code 1: Serialization (magic tag does not match)")
            self._logger.log(FakeSeverity.ERROR, "fake Error Code 4: Internal Error (Engine deserialization failed)")
            self._logger.log(FakeSeverity.WARNING, "a warning that explains nothing")
            return None
        if content.get("host_code") and not self.engine_host_code_allowed:
            self._logger.log(FakeSeverity.ERROR, "fake Error Code 2: engine host code is not allowed")
            return None
        return FakeEngine(content, self._logger)


class FakeEngine:
    def __init__(self, content: dict[str, Any], logger: FakeLogger) -> None:
        self._content, self._logger = content, logger
        self._contexts: list[FakeContext] = []

    @property
    def num_io_tensors(self) -> int:
        return len(self._content["inputs"]) + len(self._content["outputs"])

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._content["profiles"])

    @property
    def num_layers(self) -> int:
        return 3

    def get_tensor_name(self, index: int) -> str:
        return [*self._content["inputs"], *self._content["outputs"]][index]

    def get_tensor_mode(self, name: str) -> FakeMode:
        return FakeMode.INPUT if name in self._content["inputs"] else FakeMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> FakeDataType:
        return FakeDataType({**self._content["inputs"], **self._content["outputs"]}[name][0])

    def is_shape_inference_io(self, name: str) -> bool:
        return name in self._content.get("shape_inputs", ())

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[FakeDims]:
        return [FakeDims(shape) for shape in self._content["profiles"][profile_index][name]]

    def create_execution_context(self) -> FakeContext | None:
        if len(self._contexts) >= self._content.get("contexts", 100):
            self._logger.log(FakeSeverity.ERROR, "fake Error Code 2: OutOfMemory")
            return None
        self._contexts.append(CONTEXT(self._content, self._logger))
        return self._contexts[-1]


class FakeContext:
    def __init__(self, content: dict[str, Any], logger: FakeLogger) -> None:
        self._content, self._logger = content, logger
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._allocators: dict[str, FakeOutputAllocator] = {}
        self._executed: list[int] = []

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not self._stream(stream_handle):
            return False
        if not 0 <= profile_index < len(self._content["profiles"]):
            return self._refuse(f"no profile {profile_index}")
        self._profile, self._shapes = profile_index, {}
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if name not in self._content["inputs"]:
            return self._refuse(f"{name} is no input")
        low, _, high = self._content["profiles"][self._profile][name]
        fits = len(low) == len(shape) and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
        if not fits:
            return self._refuse(f"profile {self._profile} does not hold {tuple(shape)} of {name}")
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in {**self._content["inputs"], **self._content["outputs"]}:
            return self._refuse(f"{name} is no tensor of the engine")
        self._addresses[name] = memory
        return True

    def set_output_allocator(self, name: str, output_allocator: FakeOutputAllocator) -> bool:
        assert isinstance(output_allocator, FakeOutputAllocator)
        assert output_allocator._made, "pybind11 wants the base class to be initialised"
        if name not in self._content["outputs"]:
            return self._refuse(f"{name} is no output")
        self._allocators[name] = output_allocator
        return True

    def get_tensor_shape(self, name: str) -> FakeDims:
        if name in self._content["inputs"]:
            return FakeDims(self._shapes.get(name, (-1,)))
        lengths = self._lengths()
        _, shape = self._content["outputs"][name]
        return FakeDims([lengths.get(length, -1) if isinstance(length, str) else length for length in shape])

    def execute_async_v3(self, stream_handle: int) -> bool:
        if not self._stream(stream_handle):
            return False
        if "fails" in self._content:
            return self._refuse(self._content["fails"])
        if unset := set(self._content["inputs"]) - set(self._shapes):
            return self._refuse(f"shapes are not set: {sorted(unset)}")
        if stream_handle == CAPTURED_STREAM and any(-1 in self.get_tensor_shape(name) for name in self._allocators):
            return self._refuse("operation not permitted when stream is capturing")
        inputs = {}
        for name, (dtype, _) in self._content["inputs"].items():
            memory = self._memory(name, dtype, self._shapes[name])
            if memory is None:
                return False
            inputs[name] = memory.copy()
        results = KERNELS[self._content["kernel"]](inputs)
        for name, (dtype, _) in self._content["outputs"].items():
            assert results[name].dtype == dtype
            if not self._write(name, results[name], stream_handle):
                return False
        self._executed.append(self._profile)
        return True

    def _write(self, name: str, result: np.ndarray, stream: int) -> bool:
        if -1 in self.get_tensor_shape(name):
            if name not in self._allocators:
                return self._refuse(f"{name} has no allocator, and its shape is not known")
            allocator, now = self._allocators[name], self._addresses.get(name, 0)
            self._addresses[name] = allocator.reallocate_output_async(name, now, result.nbytes, 256, stream)
            allocator.notify_shape(name, FakeDims(result.shape))
        memory = self._memory(name, str(result.dtype), result.shape)
        if memory is None:
            return False
        memory[...] = result
        return True

    def _memory(self, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """What lies at a tensor's address; ``None``, and why, where that is no memory of its size."""
        size, address = math.prod(shape) * np.dtype(dtype).itemsize, self._addresses.get(name, 0)
        if not address:
            self._refuse(f"the address of {name} is not set")
            return None
        if not MEMORY.holds(address, size):
            self._refuse(f"an illegal memory access was encountered: {size} bytes of {name}")
            return None
        content = (ctypes.c_ubyte * size).from_address(address)
        return np.frombuffer(content, np.dtype(dtype)).reshape(shape)

    def _lengths(self) -> dict[str, int]:
        lengths: dict[str, int] = {}
        for name, found in self._shapes.items():
            _, shape = self._content["inputs"][name]
            lengths |= {axis: length for axis, length in zip(shape, found, strict=True) if isinstance(axis, str)}
        return lengths

    def _stream(self, handle: int) -> bool:
        return handle in (SIDE_STREAM, CAPTURED_STREAM) or self._refuse(f"no such stream: {handle}")

    def _refuse(self, why: str) -> bool:
        self._logger.log(FakeSeverity.ERROR, f"fake Error Code 3: API Usage Error ({why})")
        return False


CONTEXT: type[FakeContext] = FakeContext
"""What engines make; another one computes elsewhere."""

CLASSES: dict[str, type] = {
    "ICudaEngine": FakeEngine,
    "IExecutionContext": FakeContext,
    "ILogger": FakeLogger,
    "IOutputAllocator": FakeOutputAllocator,
    "Runtime": FakeRuntime,
    "DataType": FakeDataType,
    "Severity": FakeSeverity,
    "TensorIOMode": FakeMode,
}
"""By the name of what each stands for."""


def module(name: str) -> ModuleType:
    """What stands for the library in `sys.modules`."""
    made = ModuleType(name)
    made.__dict__.update({real: fake for real, fake in CLASSES.items() if real != "Severity"}, __version__=VERSION)
    return made
