"""AOTInductor on an NVIDIA GPU: a `torch.export` program compiled ahead of time, its runs captured as CUDA graphs."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

from exporter.artifact import Artifact, Signature, Variant
from exporter.errors import EnvironmentLackError, RequestError, first_line
from exporter.hardware import fingerprint, gpu
from exporter.targets import inductor
from exporter.targets.base import PLAINLY, BuildHow, Session, register_target
from exporter.targets.cuda import Cuda
from exporter.targets.engines import check_sheet, sheet_of, write_sheet
from exporter.targets.graph_session import CudaSession
from exporter.targets.nvidia import TORCH_WITH_CUDA, NvidiaTarget, torch_cuda
from exporter.targets.turns import Native, opening

PROBE_SECONDS = 300
SHAPED = "shaped"
"""The form that has a model for each operating point, compiled for its shapes alone, beside the one for all. Each has
its own weights. On an H100 it was 1.02 and 1.03 times as fast as the one for all on MiniLM at 1x32 and 32x128, and 1.03
and 1.01 times on an encoder of BERT-base's size (benchmarks/results/gpu-2026-11-26.md)."""
CORES_PER_MODEL = 4
"""So many models are compiled at a time that each has these."""


class InductorCudaSession(CudaSession):
    """An opened AOTInductor package on the GPU.

    Args:
        artifact: Its path is the package.
        precision: Of the variant.
        shapes: By name of a model in the package, the shapes of the inputs that it was compiled for, beside the model
            that takes all.
    """

    def __init__(
        self, artifact: Artifact, precision: str, shapes: Mapping[str, Mapping[str, Sequence[int]]] | None = None
    ) -> None:
        super().__init__(artifact, Cuda())
        self._precision = precision
        told = ""
        try:
            self._native = _Packages(artifact.path, shapes or {})
        except RuntimeError as error:
            told = first_line(error)  # the error leads to what was half opened, which is let go here, in the turn
        if self._native is None:
            raise RequestError("the AOTInductor package cannot be opened", artifact.path, told)

    def executed(self) -> dict[str, Any]:
        import torch

        kinds = inductor.compiled_types(self.artifact.path)
        halves = {"fp16": "float16", "bf16": "bfloat16"}
        floats = {kind for kind in kinds if "float" in kind}
        wanted = halves.get(self._precision, "float32")
        ran = self._precision if wanted in floats and not floats - {wanted, "float32"} else "mixed"
        return {
            "runtime": f"torch {torch.__version__} (AOTInductor)",
            "device": "cuda",
            "gpu": self.device.name,
            "provider": "compiled CUDA",
            "types": sorted(kinds),
            "precision": ran if kinds else "unknown",
            "cuda_graphs": self.graphs(),
            "shapes": [dict(shapes) for shapes in self._opened().shaped],
        }


class _Packages:
    """The models of a package that were opened: the one for all shapes, and those compiled for some alone."""

    def __init__(self, path: Path, shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
        self._path = path
        self.shaped = {_key(one): name for name, one in shapes.items()}
        # One runner, without the events by which several would take turns: these cannot be captured.
        self._models = Native(for_all=inductor.Package(path, single_threaded=True))

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        package = self._model_for(inputs)
        results = package.run([inputs[name] for name in package.inputs])
        return dict(zip(package.outputs, results, strict=True))

    def _model_for(self, inputs: dict[str, Any]) -> inductor.Package:
        """The model compiled for exactly these shapes, or the one for all."""
        name = self.shaped.get(_key({name: tensor.shape for name, tensor in inputs.items()}), "for_all")
        if self._models.get(name) is None:
            self._models[name] = inductor.Package(self._path, single_threaded=True, model=name)
        package: inductor.Package = self._models.get(name)
        return package


def _key(shapes: Mapping[str, Sequence[int]]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, tuple(shape)) for name, shape in sorted(shapes.items()))


def point_shapes(signature: Signature, points: Sequence[Mapping[str, int]]) -> dict[str, dict[str, list[int]]]:
    """By name of a model (``point0`` …), the shapes of the inputs at an operating point; those that are equal once."""
    found: dict[Any, dict[str, list[int]]] = {}
    for point in points:
        shapes = {spec.name: [d if isinstance(d, int) else point[d] for d in spec.shape] for spec in signature.inputs}
        found.setdefault(_key(shapes), shapes)
    return {f"point{number}": shapes for number, shapes in enumerate(found.values())}


def cuda_fingerprint() -> dict[str, Any]:
    """What a package compiled here depends on: `exporter.hardware.fingerprint`, CUDA's version and the GPU.

    Returns:
        Also ``cuda`` (that torch was built for), ``gpu`` (compute capability, as ``"9.0"``) and ``device`` (its name),
        the latter two ``None`` where there is no GPU.
    """
    found = gpu()["devices"]
    device = found[0] if found else {}
    return {
        **fingerprint(),
        "cuda": torch_cuda(),
        "gpu": device.get("compute_capability"),
        "device": device.get("name"),
    }


def misfits(built: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What keeps a package from running here, one phrase each: `exporter.targets.inductor.misfits`, CUDA and the GPU.

    Kernels are machine code of one compute capability. The model of the GPU is recorded and does not matter.
    """
    told = inductor.misfits(built, here)
    if built["cuda"] != here["cuda"]:
        told.append(f"CUDA: built for {built['cuda']}, here torch has {here['cuda'] or 'none'}")
    if here["gpu"] is None:
        told.append(f"a GPU of compute capability {built['gpu']} is needed, and there is none here")
    elif built["gpu"] != here["gpu"]:
        told.append(f"GPU: built for compute capability {built['gpu']}, here it is {here['gpu']}")
    return told


def check_engine(path: Path, trusted_digests: frozenset[str]) -> None:
    """Refuse an engine that is not whole, not trusted or does not fit this machine, before any of it is loaded.

    Raises:
        RequestError: Says what differs and what would mend it.
    """
    needed = {"architecture": str, "torch": str, "cpu_features": list, "cuda": str, "gpu": str, "shapes": dict}
    check_sheet(path, trusted_digests, lambda built: misfits(built, cuda_fingerprint()), needed)


def _probe(package: Path) -> None:
    """Load a package in a process of its own: a compiler whose C++ library is not the process's makes one that crashes.

    Raises:
        EnvironmentLackError: It crashed, cannot be loaded, or does not come to an end.
    """
    code = "import sys; from exporter.targets.inductor import Package; Package(sys.argv[1], single_threaded=True)"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, str(package)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=PROBE_SECONDS,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
    except subprocess.TimeoutExpired:
        raise EnvironmentLackError(
            "the compiled package does not load",
            f"not within {PROBE_SECONDS:g} s",
            "nvidia-smi shows what the GPU does",
        ) from None
    if done.returncode == 0:
        return
    print(done.stdout, file=sys.stderr)
    compiler = os.environ.get("CXX") or "g++"
    if done.returncode < 0:
        raise EnvironmentLackError(
            "the compiled package crashes when it is loaded",
            f"signal {-done.returncode}; compiled by {compiler}",
            "Compile with the system's own compiler, whose C++ library Python runs with: set CXX=/usr/bin/g++",
        )
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    raise EnvironmentLackError(
        "the compiled package cannot be loaded", lines[-1].strip()[:300] if lines else package, "The log has more"
    )


@register_target
class InductorCuda(NvidiaTarget):
    """AOTInductor packages for the GPU of this machine."""

    name = "inductor-cuda"
    consumes = "pt2"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "bf16")
    rare_forms: ClassVar = {"fp32": (SHAPED,), "fp16": (SHAPED,), "bf16": (SHAPED,)}
    portable = False
    packages = ("torch",)
    install = TORCH_WITH_CUDA

    def lacks(self) -> list[tuple[str, str]]:
        found = self.without_cuda()
        if not fingerprint().get("compiler"):
            found.append(("no C++ compiler (g++) was found", "apt-get install g++"))
        return found

    def check(self, artifact: Artifact, trusted_digests: frozenset[str]) -> None:
        check_engine(artifact.path, trusted_digests)

    def build(self, artifact: Artifact, variant: Variant, folder: Path, how: BuildHow = PLAINLY) -> list[Path]:
        self.require()
        from torch._inductor.package import package_aoti

        points = point_shapes(artifact.signature, how.points)
        largest = max(points.values(), key=lambda one: sum(map(math.prod, one.values())), default=None)
        shapes = points if variant.form == SHAPED else {}
        wanted: dict[str, dict[str, list[int]] | None] = {inductor.MODEL: None, **shapes}
        for name in wanted:
            (folder / f"compile-{name}").mkdir()
        with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // CORES_PER_MODEL)) as pool:
            jobs = {
                name: pool.submit(
                    inductor.compile_program,
                    artifact.path,
                    folder / f"compile-{name}",
                    device="cuda",
                    shapes=one,
                    tuned_for=None if one else largest,
                )
                for name, one in wanted.items()
            }
            files = {name: job.result() for name, job in jobs.items()}
        package = folder / inductor.PACKAGE
        package_aoti(str(package), files)
        for name in wanted:
            shutil.rmtree(folder / f"compile-{name}", ignore_errors=True)
        _probe(package)
        return [package, write_sheet(package, {**cuda_fingerprint(), "shapes": shapes})]

    def ingredient(self, variant: Variant) -> str:
        return f"pt2-{variant.precision}"

    def depends_on(self, variant: Variant, how: BuildHow) -> dict[str, Any]:
        return {"points": [dict(point) for point in how.points]}

    def open(
        self, artifact: Artifact, variant: Variant, *, threads: int, trusted_digests: frozenset[str] = frozenset()
    ) -> Session:
        self.require()
        self.check(artifact, trusted_digests)
        with opening():
            return InductorCudaSession(artifact, variant.precision, sheet_of(artifact.path)["shapes"])
