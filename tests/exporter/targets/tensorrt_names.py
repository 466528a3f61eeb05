"""The names of NVIDIA's own bindings, without its libraries: ``python -m tests.exporter.targets.tensorrt_names WHEEL``.

The bindings are small and can be had everywhere; the libraries that they load come from NVIDIA's index. Nine C
functions stand for these here, so that the module can be imported and looked at. Nothing in it can be called.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(__file__).parent / "tensorrt_api"
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
CLASSES = (
    "Builder",
    "BuilderFlag",
    "ComputeCapability",
    "DataType",
    "EngineInspector",
    "HardwareCompatibilityLevel",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IOutputAllocator",
    "IProgressMonitor",
    "ITensor",
    "ITimingCache",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "ParserError",
    "ProfilingVerbosity",
    "Refitter",
    "Runtime",
    "Severity",
    "TensorIOMode",
)
"""What building and running engines touches."""
LIST = """
import importlib, json, re, sys
module = importlib.import_module(sys.argv[1])
names = {"": sorted(name for name in dir(module) if not name.startswith("_"))}
for name in sys.argv[2:]:
    owner = module.ILogger if name == "Severity" else module
    if hasattr(owner, name):
        cls = getattr(owner, name)
        told = re.findall(r"\\bdef (\\w+)[(]", cls.__doc__ or "")  # what its subclasses define is listed nowhere else
        names[name] = sorted({inner for inner in (*dir(cls), *told) if not inner.startswith("_")})
print(json.dumps({"version": module.__version__, "names": names}))
"""


def names_of(place: Path, major: int, module: str = "tensorrt_bindings") -> dict[str, object]:
    """The public names of the module, and of each class in it, from the folder that holds the unpacked bindings."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "stub.c"
        source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS), encoding="utf-8")
        for library in LIBRARIES:
            name = f"lib{library}.so.{major}"
            command = ["g++", "-x", "c", "-shared", "-fPIC", str(source), "-o", str(Path(scratch) / name)]
            subprocess.run([*command, f"-Wl,-soname,{name}"], check=True)
        env = {**os.environ, "LD_LIBRARY_PATH": scratch, "PYTHONPATH": str(place)}
        done = subprocess.run(
            [sys.executable, "-c", LIST, module, *CLASSES], env=env, stdout=subprocess.PIPE, text=True, check=True
        )
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Write the names of a wheel of the bindings beside the tests."""
    wheel = Path(sys.argv[1])
    major = int(wheel.name.split("-")[1].split(".")[0])
    with tempfile.TemporaryDirectory() as place:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place)
        found = names_of(Path(place), major)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{major}.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
