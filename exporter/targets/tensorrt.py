"""The targets `tensorrt` and `tensorrt-rtx`: engines built from strongly typed ONNX, in one way for both libraries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from exporter.artifact import Artifact, Variant
from exporter.hardware import gpu
from exporter.onnx_files import external_data_name
from exporter.targets.base import PLAINLY, BuildHow, Session, register_target
from exporter.targets.engines import sheet_of
from exporter.targets.nvidia import NvidiaTarget
from exporter.targets.packages import installed_version
from exporter.targets.tensorrt_builder import RTX, TENSORRT, EngineOptions, build_engine, profiles_of
from exporter.targets.tensorrt_engine import PACKAGES, capability_of, check_engine, write_engine_sheet
from exporter.targets.turns import opening

PLAN = "model.plan"
GPUS, TIMINGS = "compute_capabilities", "timing_cache"
"""The options that name GPUs to build for, and the folder of earlier builds' timings: no engine depends on that."""
RTX_GPUS = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities that TensorRT for RTX 1.7 runs on, as its error for 9.0 (H100) lists them, with all above."""


class TensorRtTarget(NvidiaTarget):
    """What TensorRT and TensorRT for RTX have in common: engines, and Q/DQ graphs of one form."""

    module: ClassVar[str]
    consumes = "onnx"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "bf16", "int8", "fp8")
    forms: ClassVar = {"int8": ("static-smooth",)}
    rare_forms: ClassVar = {"int8": ("static",)}
    keeps_timings = True
    portable = False

    def ingredient(self, variant: Variant) -> str:
        ingredient = super().ingredient(variant)
        return f"{ingredient}-tensorrt" if variant.precision == "int8" else ingredient

    def build(self, artifact: Artifact, variant: Variant, folder: Path, how: BuildHow = PLAINLY) -> list[Path]:
        if not self.ahead(how.options):
            self.require()
        plan = folder / PLAN
        profiles, options = profiles_of(artifact.signature, how.points), EngineOptions(**self.known(how.options))
        built = build_engine(artifact.path, plan, module=self.module, profiles=profiles, options=options)
        weights = artifact.path.with_name(external_data_name(artifact.path))
        files = [path for path in (artifact.path, weights) if path.is_file()]
        return [plan, write_engine_sheet(built, self.module, files, profiles, options)]

    def known(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options that are for this library: the GPUs that are named are TensorRT for RTX's."""
        found = {name: value for name, value in options.items() if self.module == RTX or name != GPUS}
        return {**found, TIMINGS: Path(found[TIMINGS])} if TIMINGS in found else found

    def lacks(self) -> list[tuple[str, str]]:
        return self.without_cuda()

    def check(self, artifact: Artifact, trusted_digests: frozenset[str]) -> None:
        check_engine(artifact.path, trusted_digests)

    def depends_on(self, variant: Variant, how: BuildHow) -> dict[str, Any]:
        options = {name: value for name, value in self.known(how.options).items() if name != TIMINGS}
        return {"points": [dict(point) for point in how.points], "options": options}

    def open(
        self, artifact: Artifact, variant: Variant, *, threads: int, trusted_digests: frozenset[str] = frozenset()
    ) -> Session:
        self.require()
        self.check(artifact, trusted_digests)
        from exporter.targets.tensorrt_session import TensorRtSession

        host_code = bool(sheet_of(artifact.path)["options"].get("version_compatible"))
        with opening():
            return TensorRtSession(artifact, self.module, variant.precision, host_code=host_code)


@register_target
class TensorRt(TensorRtTarget):
    """TensorRT engines."""

    name = "tensorrt"
    module = TENSORRT
    packages = PACKAGES[TENSORRT]
    install = "pip install --extra-index-url https://pypi.nvidia.com tensorrt-cu13"


@register_target
class TensorRtRtx(TensorRtTarget):
    """TensorRT for RTX engines."""

    name = "tensorrt-rtx"
    module = RTX
    packages = PACKAGES[RTX]
    install = "pip install 'planish[rtx]'"

    def lacks(self) -> list[tuple[str, str]]:
        """Also a GPU that it runs on: it builds engines beside any other, and loads none."""
        devices = gpu()["devices"]
        found = devices[0].get("compute_capability") if devices else None
        lacking = super().lacks()
        if found is not None and found not in RTX_GPUS and float(found) < float(RTX_GPUS[-1]):
            what = f"TensorRT for RTX does not run on GPUs of compute capability {found}"
            lacking.append((what, "Use the target tensorrt"))
        return lacking

    def elsewhere(self, options: Mapping[str, Any]) -> str:
        devices, named = gpu()["devices"], [capability_of(name) for name in options.get(GPUS, ())]
        if not named or not devices or devices[0].get("compute_capability") in named:
            return ""
        return f"the engine is for GPUs of compute capability {' or '.join(named)}, and this machine's is another"

    def ahead(self, options: Mapping[str, Any]) -> bool:
        return bool(options.get(GPUS)) and installed_version(*self.packages) is not None
