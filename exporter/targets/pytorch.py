"""PyTorch's own sessions: eager, which every speed-up is measured against, and `torch.compile`, the stronger baseline.

They are no targets: nothing is built for them and nothing of them is released.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifact import Artifact
from exporter.errors import RequestError
from exporter.original import Original, open_described
from exporter.targets.base import Array, Binding, Session
from exporter.targets.cuda import Cuda
from exporter.targets.graph_session import CudaBinding, GraphBinding

if TYPE_CHECKING:
    from torch import nn

TORCH_DTYPES = {"fp32": "float32", "fp64": "float64", "fp16": "float16", "bf16": "bfloat16"}
Shapes = tuple[tuple[str, tuple[int, ...]], ...]
_CHOICE_SECONDS = 0.5
CAPTURED_AFTER = 4
"""Runs after which `torch.compile` has captured its CUDA graph: it compiles, warms up, records and replays."""
GRAPHS: dict[str, dict[str, str]] = {"reduce-overhead": {"mode": "reduce-overhead"}, "captured": {}}
"""Who captures runs on a GPU, and with which options of `torch.compile`: its own CUDA graphs, whose every run passes
through Python, or the session, as those of the targets do: one launch, of the same kernels."""
# One specialised graph per operating point: more of them than the default number of recompilations allows.
_RECOMPILE_LIMIT = 256
# Every frozen graph holds its own packed copy of the weights: beyond this size four of them would fill the memory.
_LARGEST_FROZEN_BYTES = 1 << 30


class PyTorchBinding(Binding):
    """Tensors bound to a module."""

    def __init__(self, call: Callable[..., dict[str, Any]], tensors: dict[str, Any]) -> None:
        self._call = call
        self._tensors = tensors
        self._outputs: dict[str, Any] = {}

    def run(self) -> None:
        import torch

        with torch.no_grad():
            self._outputs = self._call(**self._tensors)

    def outputs(self) -> dict[str, Any]:
        return {name: _readable(value) for name, value in self._outputs.items()}


class EagerSession(Session):
    """The original as PyTorch runs it when nobody does anything about it."""

    runtime = "pytorch-eager"

    def __init__(self, original: Original, *, threads: int, precision: str = "fp32", device: str = "cpu") -> None:
        import torch

        if original.module is None:
            raise RequestError(
                "the source has no PyTorch form, so PyTorch cannot be timed on it", original.source.spec, "Leave it out"
            )
        if precision not in TORCH_DTYPES:
            raise RequestError("unknown precision", precision, f"Known: {', '.join(TORCH_DTYPES)}")
        path = original.source.path or Path(original.source.spec)
        super().__init__(Artifact(path, "pytorch", original.signature, original.contract))
        torch.set_num_threads(threads)
        self.precision = precision
        self.dtype = getattr(torch, TORCH_DTYPES[precision])
        self.device = None if device == "cpu" else Cuda()
        self.module = original.module if precision == "fp32" else original.module.to(self.dtype)
        self.module.to(device)
        self.call: Callable[..., dict[str, Any]] = self.module

    def _bind(self, arrays: dict[str, Array]) -> Binding:
        import torch

        if self.device is not None:
            return CudaBinding(self.device, self._on_device, self.device.put(arrays), capture=False)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return PyTorchBinding(self.call, self._lowered(tensors))

    def _lowered(self, tensors: dict[str, Any]) -> dict[str, Any]:
        if self.precision == "fp32":
            return tensors
        return {n: t.to(self.dtype) if t.is_floating_point() else t for n, t in tensors.items()}

    def _on_device(self, tensors: dict[str, Any]) -> dict[str, Any]:
        import torch

        with torch.no_grad():
            return {name: _readable(value) for name, value in self.call(**self._lowered(tensors)).items()}

    def executed(self) -> dict[str, Any]:
        import torch

        weight = next((p for p in self.module.parameters() if p.is_floating_point()), None)
        names = {getattr(torch, dtype): name for name, dtype in TORCH_DTYPES.items()}
        return {
            "runtime": self.runtime,
            "device": "cpu" if weight is None else weight.device.type,
            "precision": self.precision if weight is None else names[weight.dtype],
            "threads": torch.get_num_threads(),
            "attention": getattr(getattr(self.module, "config", None), "_attn_implementation", None),
            "version": torch.__version__,
        }


class ProgramSession(Session):
    """A program, or what was made of it, run operator by operator: the numbers of an engine without compiling it.

    Args:
        artifact: The program; its signature and contract say what the session takes.
        module: What is run, called with inputs by name.
        threads: Compute threads.
    """

    def __init__(self, artifact: Artifact, module: nn.Module, *, threads: int) -> None:
        import torch

        super().__init__(artifact)
        torch.set_num_threads(threads)
        self.module = module

    def _bind(self, arrays: dict[str, Array]) -> PyTorchBinding:
        import torch

        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return PyTorchBinding(self.module, tensors)

    def executed(self) -> dict[str, Any]:
        return {"runtime": "pytorch-program", "device": "cpu", "precision": "fp32"}


class CompiledSession(EagerSession):
    """`torch.compile` at its strongest: weights frozen and packed, and shapes fixed or free, as is faster.

    Inductor packs FP32 weights for MKL where shapes are fixed and for oneDNN where they are free. Which of the two is
    faster depends on the processor (oneDNN by more than two times on AMD's), so both are compiled for the first shape
    that is bound, and the faster one is kept for all. On a GPU shapes are fixed, and of the ways to capture CUDA graphs
    the faster one at that shape is kept.

    Args:
        original: The model.
        threads: Compute threads.
        precision: ``fp32``, ``fp64``, ``fp16`` or ``bf16``.
        device: ``cpu`` or ``cuda``.
        graphs: On a GPU, the one of `GRAPHS` to take; ``None``: whichever is faster.
    """

    runtime = "pytorch-compile"

    def __init__(
        self,
        original: Original,
        *,
        threads: int,
        precision: str = "fp32",
        device: str = "cpu",
        graphs: str | None = None,
    ) -> None:
        import torch

        super().__init__(original, threads=threads, precision=precision, device=device)
        if graphs is not None and graphs not in GRAPHS:
            raise RequestError("unknown way to capture CUDA graphs", graphs, f"Known: {', '.join(GRAPHS)}")
        torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT
        torch._dynamo.config.accumulated_recompile_limit = _RECOMPILE_LIMIT
        self.frozen = original.source.weights_bytes < _LARGEST_FROZEN_BYTES
        self.shapes: str | None = None  # "free" or "fixed", once that is chosen
        self.graphs = graphs
        self._seconds: dict[str, float] = {}
        self._compiled: set[Shapes] = set()
        self._captured: dict[Shapes, Binding] = {}

    def _bind(self, arrays: dict[str, Array]) -> Binding:
        shapes = _shapes_of(arrays)
        if self.shapes is None:
            self._choose(arrays)
        if self.device is not None or shapes not in self._compiled:
            self._compiled.add(shapes)
            return self._compile(arrays)
        return super()._bind(arrays)

    def _bind_once(self, arrays: dict[str, Array]) -> Binding:
        if self.device is None or self.graphs == "reduce-overhead":
            return super()._bind_once(arrays)
        shapes = _shapes_of(arrays)
        held = self._captured.get(shapes)
        if held is None:  # captured once for each shape, not for each run
            held = self._captured[shapes] = self._bind(arrays)
        elif isinstance(held, GraphBinding):
            held.refill(arrays)
        return held

    def _compile(self, arrays: dict[str, Array]) -> Binding:
        """Bind and run, so that compiling and capturing are not timed as a run."""
        import torch

        # Given to `torch.compile` as an option, freezing has no effect: the graph is captured before options count.
        with torch._inductor.config.patch(freezing=self.frozen):
            if self.device is None:
                binding, runs = super()._bind(arrays), 1
            else:
                captured = self.graphs == "captured"
                binding = CudaBinding(self.device, self._on_device, self.device.put(arrays), capture=captured)
                runs = 1 if captured else CAPTURED_AFTER
            for _ in range(runs):
                binding.run()
        return binding

    def _choose(self, arrays: dict[str, Array]) -> None:
        """Take the faster of the ways to compile, by the median of some runs."""
        import torch

        if self.device is None:
            calls = {name: torch.compile(self.module, dynamic=name == "free") for name in ("free", "fixed")}
        else:
            wanted = GRAPHS if self.graphs is None else {self.graphs: GRAPHS[self.graphs]}
            calls = {name: torch.compile(self.module, dynamic=False, **options) for name, options in wanted.items()}
        for name, call in calls.items():
            self.call = call
            if self.device is not None:
                self.graphs = name
            self._seconds[name] = _median_seconds(self._compile(arrays))
        chosen = min(self._seconds, key=self._seconds.__getitem__)
        self.call = calls[chosen]
        if self.device is None:
            self.shapes = chosen
        else:
            self.shapes, self.graphs = "fixed", chosen

    def executed(self) -> dict[str, Any]:
        import torch

        counters = torch._dynamo.utils.counters
        return {
            **super().executed(),
            "frozen": self.frozen,
            "shapes": self.shapes,
            **({} if self.device is None else {"cuda_graphs": self.graphs}),
            "median_ms_at_first_shape": {name: 1e3 * seconds for name, seconds in self._seconds.items()},
            "packed_weights": int(counters["inductor"]["mkldnn_linear_weight_pack_matcher_count"]),
            "graphs": int(counters["stats"]["unique_graphs"]),
            "graph_breaks": sum(counters["graph_break"].values()),
        }


def _shapes_of(arrays: dict[str, Array]) -> Shapes:
    return tuple((name, array.shape) for name, array in sorted(arrays.items()))


def _median_seconds(binding: Binding) -> float:
    times: list[float] = []
    end = time.perf_counter() + _CHOICE_SECONDS
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        binding.run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def open_eager(arguments: dict[str, Any], *, threads: int) -> EagerSession:
    """Open the eager baseline in a worker.

    Args:
        arguments: ``original`` (see `exporter.original.original_arguments`) and, optionally, ``precision``
            (``fp32``, ``fp64``, ``fp16``, ``bf16``) and ``device`` (``cpu``, ``cuda``).
        threads: Compute threads.
    """
    return EagerSession(open_described(arguments["original"]), threads=threads, **_how(arguments))


def open_compiled(arguments: dict[str, Any], *, threads: int) -> CompiledSession:
    """Open the `torch.compile` baseline in a worker; arguments as for `open_eager`, and ``graphs`` (see there)."""
    original, graphs = open_described(arguments["original"]), arguments.get("graphs")
    return CompiledSession(original, threads=threads, graphs=graphs, **_how(arguments))


def _how(arguments: dict[str, Any]) -> dict[str, str]:
    return {"precision": arguments.get("precision", "fp32"), "device": arguments.get("device", "cpu")}


def _readable(tensor: Any) -> Any:
    """NumPy has no bfloat16, and DLPack gives it none: such outputs are widened, exactly, to float32."""
    import torch

    tensor = tensor.detach()
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
