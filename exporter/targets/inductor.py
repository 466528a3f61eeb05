"""AOTInductor on the CPU: a `torch.export` program compiled ahead of time to native code for this processor."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from exporter.artifact import Artifact, Variant
from exporter.errors import EnvironmentLackError, NoSpaceError, RequestError, first_line
from exporter.hardware import fingerprint
from exporter.targets import inductor_compile
from exporter.targets.base import PLAINLY, Array, Availability, Binding, BuildHow, Session, Target, register_target
from exporter.targets.engines import check_sheet, write_sheet
from exporter.targets.packages import installed_version

PACKAGE, MODEL = "model.pt2", "model"


class InductorBinding(Binding):
    """Inputs of one AOTInductor package, as tensors that share the caller's memory."""

    def __init__(self, package: Package, arrays: dict[str, Array]) -> None:
        import torch

        self._package = package
        # from_numpy refuses memory that is read-only; a copy is made for such arrays only.
        self._inputs = [
            torch.from_numpy(array if array.flags.writeable else array.copy())
            for array in (arrays[name] for name in package.inputs)
        ]
        self._results: list[Any] | None = None

    def run(self) -> None:
        self._results = self._package.run(self._inputs)

    def outputs(self) -> dict[str, Any]:
        if self._results is None:
            raise RequestError("outputs were asked for before the first run", None, "Call run() first")
        return {n: tensor.detach() for n, tensor in zip(self._package.outputs, self._results, strict=True)}


class Package:
    """A loaded package, and the order in which it takes and gives tensors.

    torch's own `aoti_load_package` does more than load: it imports the compiler, and asks it with half a dozen builds
    (eight seconds, and a compiler is needed) which vector instructions there are, for a warning. `check_engine` has
    looked at the processor already.

    Args:
        path: The package.
        single_threaded: One thread uses it, one run at a time.
        model: Which of its models.
    """

    def __init__(self, path: Path | str, *, single_threaded: bool = False, model: str = MODEL) -> None:
        import torch
        from torch.utils import _pytree as pytree

        self._loader = torch._C._aoti.AOTIModelPackageLoader(str(path), model, single_threaded, 1, -1)
        taken, given = (pytree.treespec_loads(text) for text in self._loader.get_call_spec())
        positional, named = taken.children()
        if positional.num_leaves or given.type is not dict:
            raise RuntimeError("its inputs or outputs have no names")
        self.inputs: list[str] = named.context
        self.outputs: list[str] = given.context

    def run(self, tensors: list[Any]) -> list[Any]:
        results: list[Any] = self._loader.boxed_run(list(tensors))  # it empties the list that it is given
        return results


class InductorSession(Session):
    """An opened AOTInductor package."""

    def __init__(self, artifact: Artifact, precision: str, threads: int) -> None:
        super().__init__(artifact)
        import torch

        torch.set_num_threads(threads)
        self._precision = precision
        try:
            self._package = Package(artifact.path)
        except RuntimeError as error:
            raise RequestError("the AOTInductor package cannot be opened", artifact.path, first_line(error)) from error

    def _bind(self, arrays: dict[str, Array]) -> InductorBinding:
        return InductorBinding(self._package, arrays)

    def executed(self) -> dict[str, Any]:
        import torch

        kinds = compiled_types(self.artifact.path)
        plain = {kind for kind in kinds if "float" in kind} <= {"float32"}
        if self._precision == "int8":
            products = integer_products(self.artifact.path)
            told = {"precision": "int8" if products else "fp32", "integer_kernels": {"qlinear": products}}
        else:
            told = {"precision": "unknown" if not kinds else self._precision if plain else "mixed"}
        return {
            "runtime": f"torch {torch.__version__} (AOTInductor)",
            "device": "cpu",
            "provider": "compiled C++",
            "types": sorted(kinds),
            **told,
        }


def compiled_types(package: Path) -> frozenset[str]:
    """The types of the tensors that compiled code holds and makes, by torch's names: its source in the package says.

    The loader itself tells names only. Empty where the package holds no source.
    """
    sources = _wrapper_sources(package)
    return frozenset(found for source in sources for found in re.findall(r"\bcached_torch_dtype_(\w+)", source))


def integer_products(package: Path) -> int:
    """How many matrix products of compiled code multiply integers: its calls of oneDNN's quantized linear."""
    return sum(len(re.findall(r"\baoti_torch_cpu__qlinear_\w+\(", source)) for source in _wrapper_sources(package))


def _wrapper_sources(package: Path) -> list[str]:
    with zipfile.ZipFile(package) as archive:
        return [archive.read(name).decode() for name in archive.namelist() if name.endswith(".wrapper.cpp")]


def check_engine(path: Path, trusted_digests: frozenset[str]) -> None:
    """Refuse an engine that is not whole, not trusted or does not fit this machine, before any of it is loaded.

    Args:
        path: The engine; its fingerprint lies beside it and says what it was built for and its SHA-256.
        trusted_digests: SHA-256 digests of the engines that may run.

    Raises:
        RequestError: Says what differs and what would mend it.
    """
    needed = {"architecture": str, "torch": str, "cpu_features": list}
    check_sheet(path, trusted_digests, lambda built: misfits(built, fingerprint()), needed)


def misfits(built: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What keeps an engine from running here, one phrase each; empty when it fits.

    The processor must have every feature that the compiler could use (more is fine), and torch must be the version that
    the generated code was written against. The compiler itself is recorded and does not matter any more.
    """
    told = [
        f"{key}: built for {built[key]}, here it is {here.get(key)}"
        for key in ("architecture", "torch")
        if built[key] != here.get(key)
    ]
    if lacking := sorted(set(built["cpu_features"]) - set(here.get("cpu_features", []))):
        told.append(f"processor features that this machine lacks: {', '.join(lacking)}")
    return told


def compile_program(
    program: Path,
    folder: Path,
    *,
    device: str = "cpu",
    shapes: Mapping[str, Sequence[int]] | None = None,
    tuned_for: Mapping[str, Sequence[int]] | None = None,
) -> list[str]:
    """Compile in a process of its own, whose memory is free again when the archive is written; the files it made.

    In one process AOTInductor holds the weights four times at its peak: as they came, packed for the processor, as
    bytes of the library, and as bytes of the archive.
    """
    cache, listing = folder / "inductor-cache", folder / "inductor-cache" / "files.json"
    cache.mkdir(parents=True, exist_ok=True)
    # No pool of compile workers: it would outlive a job that is killed. Compiled code goes to the job's own folder.
    how = [device, json.dumps(shapes), json.dumps(tuned_for)]
    done = subprocess.run(
        [sys.executable, "-P", inductor_compile.__file__, str(program), str(listing), *how],
        env={
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(cache),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        if "No space left on device" in done.stdout:
            raise NoSpaceError("no space is left to compile the model", folder, "Free some disk space")
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)] or lines  # hints follow it
        told = named[-1].strip()[:300] if lines and done.returncode > 0 else f"exit status {done.returncode}"
        raise EnvironmentLackError(
            "AOTInductor could not compile the model", told, "The log has the compiler's own words"
        )
    files: list[str] = json.loads(listing.read_text(encoding="utf-8"))
    return files


@register_target
class InductorCpu(Target):
    """AOTInductor packages for this processor."""

    name = "inductor-cpu"
    consumes = "pt2"
    precisions = ("fp32", "int8")
    forms: ClassVar = {"int8": ("static-smooth",)}
    rare_forms: ClassVar = {"int8": ("static", "dynamic")}
    portable = False

    def availability(self, variant: Variant | None = None) -> Availability:
        found = installed_version("torch")
        if found is None:
            return Availability(False, "torch is not installed", "pip install torch")
        compiler = fingerprint().get("compiler")
        if not compiler:
            return Availability(False, "no C++ compiler (g++) was found", "apt-get install g++", {"torch": found})
        return Availability(True, versions={"torch": found, "compiler": str(compiler)})

    def buildable(self, variant: Variant) -> Availability:
        if variant.precision == "int8" and installed_version("torchao") is None:
            return Availability(
                False, "torchao, which quantizes for it, is not installed", "pip install 'planish[cpu]'"
            )
        return self.availability(variant)

    def build(self, artifact: Artifact, variant: Variant, folder: Path, how: BuildHow = PLAINLY) -> list[Path]:
        files = compile_program(artifact.path, folder)
        from torch._inductor.package import package_aoti

        package = folder / PACKAGE
        package_aoti(str(package), files)
        shutil.rmtree(folder / "inductor-cache", ignore_errors=True)
        return [package, write_sheet(package, fingerprint())]

    def check(self, artifact: Artifact, trusted_digests: frozenset[str]) -> None:
        check_engine(artifact.path, trusted_digests)

    def open(
        self, artifact: Artifact, variant: Variant, *, threads: int, trusted_digests: frozenset[str] = frozenset()
    ) -> Session:
        self.check(artifact, trusted_digests)
        return InductorSession(artifact, variant.precision, threads)
