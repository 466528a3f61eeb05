"""Builds the simulated CUDA libraries, with stubs for all that they do not simulate.

Each stands where NVIDIA's library of the same name would, and defines every symbol that the given runtimes need of it:
a simulated function, or a stub that says "not supported".
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
CUDART = "libcudart.so.13"
SIMULATED = {
    CUDART: "runtime.cpp",
    "libcublas.so.13": "cublas.cpp",
    "libcublasLt.so.13": "cublaslt.cpp",
    "libcuda.so.1": "driver.cpp",
    "libcudnn.so.9": "cudnn.cpp",
}
"""What is more than stubs, and its source; the first is needed by the others."""
NOT_SUPPORTED = {CUDART: 801, "libcuda.so.1": 801, "libcublas.so.13": 15, "libcublasLt.so.13": 15}
"""What stubs return; elsewhere 1, which is a failure in each of NVIDIA's libraries."""
OWNERS = (
    ("cublasLt", "libcublasLt.so.13"),
    ("cublas", "libcublas.so.13"),
    ("cusparseLt", "libcusparseLt.so.0"),
    ("cusparse", "libcusparse.so.12"),
    ("cusolver", "libcusolver.so.12"),
    ("cudnn", "libcudnn.so.9"),
    ("cufft", "libcufft.so.12"),
    ("curand", "libcurand.so.10"),
    ("p?nccl", "libnccl.so.2"),
    ("nvrtc", "libnvrtc.so.13"),
    ("cuFile", "libcufile.so.0"),
    ("cupti", "libcupti.so.13"),
    ("nvshmem", "libnvshmem_host.so.3"),
    ("(__)?cuda", CUDART),
    ("cu[A-Z]", "libcuda.so.1"),
)
"""Which library a symbol belongs to, by what its name begins with."""


def build(folder: Path, runtimes: Sequence[Path], include: Path) -> None:
    """Build the libraries that some runtimes need.

    Args:
        folder: Where they go; put it into ``LD_LIBRARY_PATH``.
        runtimes: The shared libraries that are to find them, such as ONNX Runtime's CUDA provider.
        include: CUDA's headers.

    Raises:
        subprocess.CalledProcessError: The compiler's words have been printed.
    """
    needed: dict[str, set[str]] = defaultdict(set)
    versions: dict[str, str] = {}
    for runtime in runtimes:
        for library in re.findall(r"NEEDED.*\[(lib(?:cu|nccl|nv)[^\]]*)\]", _run("readelf", "-d", runtime)):
            needed[library]  # even if nothing is asked of it
        for symbol in _symbols(runtime, "--undefined-only"):
            name, _, version = symbol.partition("@")
            for owner, library in OWNERS:
                if re.match(owner, name):
                    needed[library].add(name)
                    if version:
                        versions[library] = version
                    break
    for library in sorted(needed, key=lambda library: library != CUDART):
        source = HERE / SIMULATED[library] if library in SIMULATED else None
        _compile(folder, library, source, needed[library], versions.get(library, library), include)


def _compile(folder: Path, library: str, source: Path | None, needed: set[str], version: str, include: Path) -> None:
    map_of_versions = folder / f"{library}.map"
    map_of_versions.write_text(f"{version} {{ global: *; }};\n")
    flags = ["-shared", "-fPIC", "-pthread", f"-Wl,-soname,{library}", f"-Wl,--version-script,{map_of_versions}"]
    objects: list[Path] = []
    simulated: set[str] = set()
    if source is not None:
        objects.append(folder / f"{source.stem}.o")
        _run("g++", "-std=c++17", "-O2", "-Wall", "-fPIC", f"-I{include}", "-c", source, "-o", objects[0])
        simulated = set(_symbols(objects[0], "--defined-only"))
        if library != CUDART:
            objects.append(folder / CUDART)
    stubs = folder / f"{library}.stubs.c"
    returned = NOT_SUPPORTED.get(library, 1)
    stubs.write_text("".join(_stub(name, returned) for name in sorted(needed - simulated)))
    _run("g++", "-w", "-x", "c", stubs, "-x", "none", *objects, *flags, "-o", folder / library)


def _stub(name: str, returned: int) -> str:
    if name.endswith(("String", "Name")):
        return f'const char *{name}(void) {{ return "not simulated"; }}\n'
    return f"int {name}(void) {{ return {returned}; }}\n"


def _symbols(library: Path, which: str) -> list[str]:
    return [
        line.split()[-1] for line in _run("nm", *(["-D"] if ".so" in library.name else []), which, library).splitlines()
    ]


def _run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True).stdout
