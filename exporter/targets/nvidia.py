"""The NVIDIA targets: registered, so that every run names them; skipped, with what to do with their files instead."""

from __future__ import annotations

import ctypes.util
import os
from pathlib import Path
from typing import ClassVar

from exporter.artifact import Artifact, Variant
from exporter.errors import EnvironmentLackError
from exporter.targets.base import Availability, Session, Target, register_target
from exporter.targets.packages import installed_version


def has_driver() -> bool:
    """Whether NVIDIA's driver library is on this machine. Nothing is loaded."""
    return ctypes.util.find_library("cuda") is not None or os.path.exists("/proc/driver/nvidia/version")


class NvidiaTarget(Target):
    """A target that needs an NVIDIA GPU to run."""

    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "bf16")
    packages: ClassVar[tuple[str, ...]]
    install: ClassVar[str]
    unsupported: ClassVar = "this version of Planish makes the ONNX file for this target but does not run it yet"
    instead: ClassVar = "Run the file with the vendor's own runtime, on a machine with an NVIDIA GPU"

    def availability(self, variant: Variant | None = None) -> Availability:
        """Why it cannot run here: Planish does not run it yet, wherever; then what else it would need."""
        found = installed_version(*self.packages)
        versions = {} if found is None else {self.packages[0]: found}
        if not has_driver():
            reason = f"{self.unsupported}; there is no NVIDIA driver on this machine either"
            return Availability(False, reason, self.instead, versions)
        needs = f"; {self.packages[0]} is not installed here: {self.install}" if found is None else ""
        return Availability(False, self.unsupported, self.instead + needs, versions)

    def _unavailable(self, variant: Variant) -> EnvironmentLackError:
        state = self.availability(variant)
        return EnvironmentLackError("this target cannot run here", f"{self.name}: {state.reason}", state.remedy)

    def build(self, artifact: Artifact, variant: Variant, folder: Path) -> list[Path]:
        raise self._unavailable(variant)

    def open(
        self, artifact: Artifact, variant: Variant, *, threads: int, trusted_digests: frozenset[str] = frozenset()
    ) -> Session:
        raise self._unavailable(variant)


@register_target
class OnnxRuntimeCuda(NvidiaTarget):
    """ONNX Runtime's CUDA provider."""

    name = "onnxruntime-cuda"
    consumes = "onnx"
    packages = ("onnxruntime-gpu",)
    install = "pip install onnxruntime-gpu, where onnxruntime is not"


@register_target
class InductorCuda(NvidiaTarget):
    """AOTInductor packages for CUDA."""

    name = "inductor-cuda"
    consumes = "pt2"
    portable = False
    packages = ("torch",)
    install = "install a CUDA build of torch (docs/targets.md says where from)"
    unsupported = "this version of Planish does not compile for this target yet"
    instead = "An ONNX file of the bundle runs on a machine with an NVIDIA GPU, in the vendor's own runtime"


class TensorRtTarget(NvidiaTarget):
    """What TensorRT and TensorRT for RTX have in common: engines, and Q/DQ graphs of one form."""

    consumes = "onnx"
    precisions = ("fp32", "fp16", "bf16", "int8", "fp8")
    forms: ClassVar = {"int8": ("static-smooth",)}
    rare_forms: ClassVar = {"int8": ("static",)}
    portable = False

    def ingredient(self, variant: Variant) -> str:
        ingredient = super().ingredient(variant)
        return f"{ingredient}-tensorrt" if variant.precision == "int8" else ingredient


@register_target
class TensorRt(TensorRtTarget):
    """TensorRT engines."""

    name = "tensorrt"
    packages = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
    install = "`pip install tensorrt`, from NVIDIA's package index (docs/targets.md)"


@register_target
class TensorRtRtx(TensorRtTarget):
    """TensorRT for RTX engines."""

    name = "tensorrt-rtx"
    packages = ("tensorrt-rtx-cu13", "tensorrt-rtx")
    install = "pip install 'planish[rtx]'"
