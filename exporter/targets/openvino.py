"""OpenVINO on the CPU: portable ONNX, computed in FP32 or, where the processor has it, in BF16; Q/DQ graphs in int8.

OpenVINO computes FP32 graphs in BF16 by default where the processor has BF16 instructions. That is a variant here,
and `openvino-cpu-fp32` pins the precision. Which precision ran is read from the compiled model's execution graph.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from exporter.artifact import Artifact, Variant
from exporter.errors import InternalError, RequestError, first_line, missing_package
from exporter.onnx_files import external_data_name
from exporter.targets.base import (
    PLAINLY,
    Array,
    Availability,
    Binding,
    BuildHow,
    Session,
    Target,
    output_shapes,
    register_target,
)
from exporter.targets.packages import installed_version
from exporter.targets.shape_cache import ShapeCache

HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
"""What the arithmetic between the quantized products is pinned to, by precision."""
RUNS_AS = {"fp32": frozenset({"f32"}), "bf16": frozenset({"bf16"}), "int8": frozenset({"i8", "u8"})}
"""The plugin's own names for what compute layers of a precision run in."""
BETWEEN_BF16, SHAPED = "bf16", "shaped"
"""What a form of int8 may have at its end: BF16 between the integer products, and a model compiled for each shape. The
file is that of the form without them."""
MOST_SHAPES, MOST_SHAPED_BYTES = 4, 1_000_000_000
"""Shapes that a shaped session holds a compiled model for: fewer where the file is so large that they would together
be larger, as each model has its own weights."""
SMALL_SECONDS = 0.005
"""Of a run shorter than this a shaped session looks whether one thread is faster: handing work over takes time too."""
# The operators whose precision decides what a variant may be called: they do the arithmetic.
COMPUTE_LAYERS = frozenset({"FullyConnected", "MatMul", "Convolution", "ScaledDotProductAttention", "MHA", "Gemm"})


class OpenVinoBinding(Binding):
    """Inputs and outputs of one OpenVINO infer request, shared with the caller's memory."""

    def __init__(self, request: Any, artifact: Artifact, arrays: dict[str, Array]) -> None:
        import openvino

        self._request = request
        self._arrays = arrays
        self._outputs: dict[str, Array] = {}
        self._tensors = {name: openvino.Tensor(array, shared_memory=True) for name, array in arrays.items()}
        self._artifact = artifact
        for name, shape in output_shapes(artifact.signature, arrays).items():
            if shape is not None:
                dtype = next(spec.dtype for spec in artifact.signature.outputs if spec.name == name)
                self._outputs[name] = np.empty(shape, dtype=dtype)
                self._tensors[name] = openvino.Tensor(self._outputs[name], shared_memory=True)
        for name, tensor in self._tensors.items():
            request.set_tensor(name, tensor)

    def run(self) -> None:
        self._request.infer()

    def outputs(self) -> dict[str, Any]:
        names = [spec.name for spec in self._artifact.signature.outputs]
        missing = {name: np.array(self._request.get_tensor(name).data) for name in names if name not in self._outputs}
        return {name: self._outputs.get(name, missing.get(name)) for name in names}


class OpenVinoSession(Session):
    """An ONNX file compiled by OpenVINO's CPU plugin."""

    def __init__(
        self, artifact: Artifact, precision: str, threads: int, *, hint: str | None = None, shaped: bool = False
    ) -> None:
        super().__init__(artifact)
        try:
            import openvino
        except ImportError:
            raise missing_package("openvino", "cpu") from None
        self._version = openvino.__version__.split("-")[0]
        self._settings = {
            "INFERENCE_PRECISION_HINT": hint or HINTS[precision],
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        try:
            self._core = openvino.Core()
            self._source = self._core.read_model(str(artifact.path))
            self._model = self._core.compile_model(self._source, "CPU", self._settings)
        except RuntimeError as error:
            raise RequestError("OpenVINO cannot open the model", artifact.path, first_line(error)) from error
        self._precision = precision
        self._shaped: ShapeCache[Any] | None = ShapeCache(_most_shapes(artifact.path)) if shaped else None
        self._layers = layer_precisions(self._model)
        wanted, found = RUNS_AS[precision], set(self._layers)
        # Of a Q/DQ graph OpenVINO fuses what it can; where that was nothing `executed` tells it.
        if (precision == "fp32" and found - wanted) or (precision == "bf16" and found and not wanted & found):
            raise InternalError(
                "OpenVINO computes in another precision than was asked for", dict(self._layers), "Report this as a bug"
            )

    def _bind(self, arrays: dict[str, Array]) -> OpenVinoBinding:
        model = self._model
        if self._shaped is not None:
            model = self._shaped.get(_shapes_of(arrays), lambda: self._fixed(arrays))
        return OpenVinoBinding(model.create_infer_request(), self.artifact, arrays)

    def _bind_once(self, arrays: dict[str, Array]) -> OpenVinoBinding:
        model = None
        if self._shaped is not None:
            model = self._shaped.find(_shapes_of(arrays), lambda: self._fixed(arrays))
        return OpenVinoBinding((model or self._model).create_infer_request(), self.artifact, arrays)

    def _fixed(self, arrays: dict[str, Array]) -> Any:
        """The model compiled for the shapes of these arrays: it computes none any more."""
        import openvino

        shapes = {name: list(array.shape) for name, array in arrays.items()}
        fixed = self._source.clone()
        try:
            fixed.reshape({name: openvino.PartialShape(shape) for name, shape in shapes.items()})
            made = self._fastest(fixed, arrays)
        except RuntimeError as error:
            raise RequestError("OpenVINO cannot compile the model for a shape", shapes, first_line(error)) from error
        self._layers = layer_precisions(made)
        return made

    def _fastest(self, model: Any, arrays: dict[str, Array]) -> Any:
        """A model compiled for all threads or, where that runs a small one faster, for one."""
        several = self._core.compile_model(model, "CPU", self._settings)
        if self._settings["INFERENCE_NUM_THREADS"] == 1:
            return several
        together = self._seconds(several, arrays)
        if together >= SMALL_SECONDS:
            return several
        alone = self._core.compile_model(model, "CPU", {**self._settings, "INFERENCE_NUM_THREADS": 1})
        return alone if self._seconds(alone, arrays) < together else several

    def _seconds(self, compiled: Any, arrays: dict[str, Array]) -> float:
        """The median of some runs."""
        binding = OpenVinoBinding(compiled.create_infer_request(), self.artifact, arrays)
        times = []
        for _ in range(15):
            start = time.perf_counter()
            binding.run()
            times.append(time.perf_counter() - start)
            if times[0] >= SMALL_SECONDS:
                break
        return statistics.median(times)

    def executed(self) -> dict[str, Any]:
        return {
            "runtime": f"openvino {self._version}",
            "device": ", ".join(self._model.get_property("EXECUTION_DEVICES")).lower(),
            "provider": "CPU plugin",
            "precision": self._precision_that_ran(),
            "compute_layers": dict(sorted(self._layers.items())),
            "shapes": "free" if self._shaped is None else "fixed",
        }

    def _precision_that_ran(self) -> str:
        if not self._layers:  # a model without arithmetic: only that nothing lower was allowed is certain
            return "fp32" if self._precision == "fp32" else "unknown"
        if self._precision == "int8":  # what its record keeps in FP32 is meant to be there
            return "int8" if RUNS_AS["int8"] & set(self._layers) else "fp32"
        return self._precision if set(self._layers) == RUNS_AS[self._precision] else "mixed"


def _shapes_of(arrays: dict[str, Array]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, array.shape) for name, array in sorted(arrays.items()))


def _most_shapes(path: Path) -> int:
    data = path.with_name(external_data_name(path))
    size = path.stat().st_size + (data.stat().st_size if data.is_file() else 0)
    return max(1, min(MOST_SHAPES, MOST_SHAPED_BYTES // max(1, size)))


def layer_precisions(model: Any) -> Counter[str]:
    """How many compute layers of a compiled model run in which precision (OpenVINO's names: ``f32``, ``bf16``)."""
    counts: Counter[str] = Counter()
    for operation in model.get_runtime_model().get_ops():
        info = operation.get_rt_info()
        if "layerType" in info and info["layerType"].astype(str) in COMPUTE_LAYERS:
            counts[info["runtimePrecision"].astype(str)] += 1
    return counts


@lru_cache(maxsize=1)
def _capabilities() -> frozenset[str]:
    import openvino

    return frozenset(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


@register_target
class OpenVinoCpu(Target):
    """OpenVINO's CPU plugin."""

    name = "openvino-cpu"
    consumes = "onnx"
    precisions = ("fp32", "bf16", "int8")
    forms: ClassVar = {"int8": ("static-smooth", "static-smooth-bf16", "static-smooth-bf16-shaped")}
    rare_forms: ClassVar = {"int8": ("static", "static-bf16", "static-smooth-shaped")}

    def availability(self, variant: Variant | None = None) -> Availability:
        found = installed_version("openvino")
        if found is None:
            return Availability(False, "openvino is not installed", "pip install 'planish[cpu]'")
        bf16 = variant is not None and (variant.precision == "bf16" or BETWEEN_BF16 in _endings(variant))
        if bf16 and "BF16" not in _capabilities():
            reason = "this processor has no BF16 instructions (avx512_bf16 or amx_bf16)"
            return Availability(False, reason, "Run on a processor that has them", {"openvino": found})
        return Availability(True, versions={"openvino": found})

    def ingredient(self, variant: Variant) -> str:
        if variant.precision == "int8":
            return f"onnx-int8-{self.opened(variant).form}-openvino"
        return "onnx-fp32"  # it lowers the precision itself, while it compiles

    def opened(self, variant: Variant) -> Variant:
        if endings := _endings(variant):
            parts = [part for part in str(variant.form).split("-") if part not in endings]
            return replace(variant, form="-".join(parts))
        return variant

    def build(self, artifact: Artifact, variant: Variant, folder: Path, how: BuildHow = PLAINLY) -> list[Path]:
        return []

    def open(
        self, artifact: Artifact, variant: Variant, *, threads: int, trusted_digests: frozenset[str] = frozenset()
    ) -> Session:
        endings = _endings(variant)
        hint = "bf16" if BETWEEN_BF16 in endings else None
        return OpenVinoSession(artifact, variant.precision, threads, hint=hint, shaped=SHAPED in endings)


def _endings(variant: Variant) -> set[str]:
    """What the form of an int8 variant has at its end."""
    return set(str(variant.form).split("-")) & {BETWEEN_BF16, SHAPED} if variant.precision == "int8" else set()
