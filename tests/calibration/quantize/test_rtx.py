"""What TensorRT for RTX makes of the Q/DQ forms: its builder needs no GPU. Skips without the package."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from calibration.quantize.qdq import SCHEMES, quantize_static

from .conftest import WIDTH
from .test_qdq import LINEAR, calibrated

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx-cu13 is not installed"),
]

# In a process of its own: the library is large, and an error inside it must not end the tests.
BUILD = r"""
import json, re, sys
import tensorrt_rtx as trt

class Log(trt.ILogger):
    def __init__(self):
        super().__init__()
        self.lines = []
    def log(self, severity, message):
        self.lines.append((severity, message))

path, capability, width = sys.argv[1], sys.argv[2], int(sys.argv[3])
log = Log()
builder = trt.Builder(log)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, log)
parsed = parser.parse_from_file(path)
config = builder.create_builder_config()
config.num_compute_capabilities = 1
config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
profile = builder.create_optimization_profile()
profile.set_shape("x", (1, 1, width), (2, 16, width), (4, 32, width))
config.add_optimization_profile(profile)
plan = builder.build_serialized_network(network, config) if parsed else None
inputs = []
for _, message in log.lines:
    for line in message.splitlines():
        if found := re.match(r"Name: .*?, LayerType: (\w+), Inputs: \[(.*?)\], Const", line):
            inputs.append([found[1], re.findall(r"Datatype: (\w+)", found[2])])
errors = [m for s, m in log.lines if s in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)]
print(json.dumps({"bytes": None if plan is None else plan.nbytes, "errors": errors, "layers": inputs}))
"""


@pytest.mark.parametrize("capability", ["SM89", "SM120"])
@pytest.mark.parametrize(("scheme", "dtype"), [("tensorrt", "Int8"), ("tensorrt-fp8", "FP8")])
def test_the_builder_takes_the_pairs_into_its_products(
    encoder: Path, tmp_path: Path, scheme: str, dtype: str, capability: str
) -> None:
    out = tmp_path / "quantized.onnx"
    quantize_static(encoder, out, calibrated(encoder), SCHEMES[scheme])
    command = [sys.executable, "-c", BUILD, str(out), capability, str(WIDTH)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    built = json.loads(done.stdout.splitlines()[-1])
    assert built["errors"] == []
    assert built["bytes"] > 0
    products = [types for kind, types in built["layers"] if kind == "gemm"]
    # Query, key and value may be one product of three times the width.
    assert len(products) >= len(LINEAR) - 2
    assert all(types[0] == dtype for types in products), built["layers"]
