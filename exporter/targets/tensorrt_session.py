"""Running TensorRT engines: profiles, addresses and outputs of an execution context, in the form that sessions have."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from exporter.artifact import Artifact, Signature
from exporter.errors import EnvironmentLackError, RequestError
from exporter.targets.cuda import Cuda
from exporter.targets.graph_session import Call, CudaSession
from exporter.targets.turns import Native

TYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int64": "INT64",
    "int32": "INT32",
    "int8": "INT8",
    "uint8": "UINT8",
    "bool": "BOOL",
}
"""TensorRT's names of element types, by NumPy's."""


def _enumerator(value: Any) -> str:
    """``"FLOAT"`` of ``DataType.FLOAT``."""
    return str(value).rpartition(".")[2]


class TensorRtSession(CudaSession):
    """An engine that has been checked (`exporter.targets.tensorrt_engine.check_engine`), opened.

    Args:
        artifact: Its path is the plan.
        module: ``"tensorrt"`` or ``"tensorrt_rtx"``.
        precision: Of the variant.
        host_code: The engine is version-compatible, and brings code for the host.
        device: The GPU.

    Raises:
        RequestError: The library refuses the engine, or its tensors are not those of the signature.
        EnvironmentLackError: The library is not installed.
    """

    def __init__(
        self, artifact: Artifact, module: str, precision: str, *, host_code: bool = False, device: Cuda | None = None
    ) -> None:
        super().__init__(artifact, device or Cuda())
        self._precision, self._module = precision, module
        try:
            self._trt = importlib.import_module(module)
        except (ImportError, OSError) as error:
            raise EnvironmentLackError(
                f"{module} cannot be imported", error, "docs/nvidia.md says how to install it"
            ) from error
        self._log = _logger(self._trt)
        opened = Native(runtime=self._trt.Runtime(self._log))
        if host_code:
            opened.runtime.engine_host_code_allowed = True
        opened["engine"] = opened.runtime.deserialize_cuda_engine(artifact.path.read_bytes())
        if opened.engine is None:
            raise RequestError("TensorRT cannot load the engine", self._log.told(), "Build it again on this machine")
        self._check_tensors(opened.engine)
        self._native = _Executor(self._trt, opened, self._log, self.device, self.artifact.signature)

    def _check_tensors(self, engine: Any) -> None:
        """Names, types and directions: an engine that reads another type than it is given reads beyond its buffer."""
        signature = self.artifact.signature
        found = {}
        for name in (engine.get_tensor_name(index) for index in range(engine.num_io_tensors)):
            mode = "input" if engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT else "output"
            found[name] = (mode, _enumerator(engine.get_tensor_dtype(name)))
            if engine.is_shape_inference_io(name):  # its values would have to be in the host's memory
                what = "the engine has a tensor whose values are shapes, which Planish does not run"
                raise RequestError(what, name, "Make the model's shapes depend on its inputs' shapes alone")
        wanted = {spec.name: ("input", TYPES.get(spec.dtype, spec.dtype)) for spec in signature.inputs}
        wanted |= {spec.name: ("output", TYPES.get(spec.dtype, spec.dtype)) for spec in signature.outputs}
        if found != wanted:
            odd = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
            told = ", ".join(f"{name} ({' '.join(found.get(name, ('is not there',)))})" for name in odd)
            raise RequestError("the engine's tensors are not those of the signature", told, "Build the engine again")

    def call_to_capture(self) -> Call:
        """With contexts of its own: a captured graph holds the addresses and the shapes that its context had."""
        other: _Executor = self._opened().like()
        return other

    def executed(self) -> dict[str, Any]:
        engine = self._opened().engine
        return {
            "runtime": f"{self._module} {self._trt.__version__}",
            "device": "cuda",
            "gpu": self.device.name,
            "provider": "TensorRT",
            "precision": self._precision,
            "profiles": int(engine.num_optimization_profiles),
            "layers": int(engine.num_layers),
            "cuda_graphs": self.graphs(),
        }


class _Executor:
    """Execution contexts of an engine, one for each profile that was needed."""

    def __init__(self, trt: Any, opened: Native, log: Any, device: Cuda, signature: Signature) -> None:
        self._trt, self._opened, self._log, self._device, self._signature = trt, opened, log, device, signature
        self._nothing = device.empty((1,), "uint8")
        self._contexts = Native()
        self._allocators: dict[int, dict[str, Any]] = {}
        self._profiles = self._ranges()

    @property
    def engine(self) -> Any:
        return self._opened.engine

    def like(self) -> _Executor:
        """Another one of the same engine."""
        return _Executor(self._trt, self._opened, self._log, self._device, self._signature)

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        profile = choose_profile(self._profiles, shapes)
        with self._device.beside() as stream:
            context = self._context(profile, stream)
            for name, tensor in inputs.items():
                if not context.set_input_shape(name, shapes[name]):
                    raise RequestError("the engine does not take a shape", f"{name}: {shapes[name]}", "Build it again")
                context.set_tensor_address(name, self._address(tensor))
            outputs, allocators = {}, self._allocators[profile]
            for spec in self._signature.outputs:
                shape = tuple(context.get_tensor_shape(spec.name))
                if -1 in shape:  # it depends on the values, so the engine asks for the memory when it knows
                    allocator = allocators.setdefault(spec.name, _allocator(self._trt, self._device))
                    context.set_output_allocator(spec.name, allocator)
                    continue
                outputs[spec.name] = self._device.empty(shape, spec.dtype)
                context.set_tensor_address(spec.name, self._address(outputs[spec.name]))
            if allocators and self._device.capturing():
                names = ", ".join(allocators)
                raise RuntimeError(f"the shape of an output depends on the values of the inputs: {names}")
            if not context.execute_async_v3(stream):
                raise RequestError("TensorRT could not run the engine", shapes, self._log.told())
        if allocators:
            self._device.wait()  # only then are the shapes known: nothing of this can be captured
            dtypes = {spec.name: spec.dtype for spec in self._signature.outputs}
            for name, allocator in allocators.items():
                outputs[name] = self._device.view(allocator.buffer, allocator.shape, dtypes[name])
        return {spec.name: outputs[spec.name] for spec in self._signature.outputs}

    def _address(self, tensor: Any) -> int:
        """Of a tensor's memory; one without elements has none, and the library takes no null for an address."""
        return int(tensor.data_ptr() or self._nothing.data_ptr())

    def _context(self, profile: int, stream: int) -> Any:
        name = str(profile)
        context = self._contexts.get(name)
        if context is None:
            context = self.engine.create_execution_context()
            if context is None:
                raise EnvironmentLackError(
                    "no execution context could be made", "too little memory on the GPU", "Free some of it"
                )
            if not context.set_optimization_profile_async(profile, stream):
                raise RequestError("the engine has no such profile", profile, "Build the engine again")
            self._contexts[name], self._allocators[profile] = context, {}
        return context

    def _ranges(self) -> list[dict[str, Sequence[tuple[int, ...]]]]:
        names = [spec.name for spec in self._signature.inputs]
        return [
            {name: [tuple(shape) for shape in self.engine.get_tensor_profile_shape(name, index)] for name in names}
            for index in range(self.engine.num_optimization_profiles)
        ]


def choose_profile(
    profiles: Sequence[Mapping[str, Sequence[tuple[int, ...]]]], shapes: Mapping[str, tuple[int, ...]]
) -> int:
    """The profile to run shapes with: of those whose range holds them, the one whose usual shapes are nearest.

    Args:
        profiles: By input, the smallest, the usual and the largest shape of each.
        shapes: By input.

    Raises:
        RequestError: No profile holds them.
    """
    fitting = [(_distance(profile, shapes), i) for i, profile in enumerate(profiles) if _holds(profile, shapes)]
    if not fitting:
        held = [{name: (ranges[0], ranges[2]) for name, ranges in profile.items()} for profile in profiles]
        raise RequestError("no profile of the engine holds these shapes", shapes, f"It was built for {held}")
    return min(fitting)[1]


def _holds(profile: Mapping[str, Sequence[tuple[int, ...]]], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return all(
        low <= length <= high
        for name, shape in shapes.items()
        for low, length, high in zip(profile[name][0], shape, profile[name][2], strict=True)
    )


def _distance(profile: Mapping[str, Sequence[tuple[int, ...]]], shapes: Mapping[str, tuple[int, ...]]) -> float:
    """How many times more, or less, elements the usual shapes have, over the inputs together."""
    usual = sum(_elements(profile[name][1]) for name in shapes)
    asked = sum(map(_elements, shapes.values()))
    return max(usual, asked) / max(1, min(usual, asked))


def _elements(shape: Sequence[int]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product


def _allocator(trt: Any, device: Cuda) -> Any:
    class Allocator(trt.IOutputAllocator):
        """Gives the engine memory for an output whose shape it has found out."""

        def __init__(self) -> None:
            super().__init__()
            self.buffer: Any = None
            self.shape: tuple[int, ...] = ()

        def reallocate_output_async(self, tensor_name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            if self.buffer is None or self.buffer.numel() < size:
                self.buffer = device.empty((max(size, 1),), "uint8")
            return int(self.buffer.data_ptr())

        def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:
            return self.reallocate_output_async(tensor_name, memory, size, alignment, 0)

        def notify_shape(self, tensor_name: str, shape: Any) -> None:
            self.shape = tuple(shape)

    return Allocator()


def _logger(trt: Any) -> Any:
    severity = trt.ILogger.Severity
    bad = (severity.INTERNAL_ERROR, severity.ERROR)

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []

        def log(self, level: Any, message: str) -> None:
            if level in bad:
                self.lines.append(message)

        def told(self) -> str:
            """What it has said since it was asked last: the cause, and often what followed from it."""
            lines, self.lines = self.lines, []
            return "; ".join(lines) or "it gives no reason"

    return Log()
