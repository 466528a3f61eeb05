from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from exporter import hardware


def test_the_probe_agrees_with_independent_witnesses() -> None:
    found = hardware.probe()
    assert json.loads(json.dumps(found)) == found
    assert found["memory_bytes"] == psutil.virtual_memory().total
    assert found["cpu"]["threads"] == psutil.cpu_count()
    assert found["cpu"]["cores"] == psutil.cpu_count(logical=False)
    assert found["cpu"]["affinity"] == sorted(os.sched_getaffinity(0))
    assert found["gpu"]["available"] == torch.cuda.is_available() or not torch.backends.cuda.is_built()
    assert found["gpu"]["available"] or found["gpu"]["reason"]


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.uname().machine != "x86_64", reason="x86-64 names")
def test_cpu_features_agree_with_torch() -> None:
    features = hardware.cpu_features()
    assert features == sorted(features)
    capability = torch.backends.cpu.get_cpu_capability()
    assert ("avx512f" in features) == (capability == "AVX512")
    assert "sse4_2" in features
    assert not {"lm", "nx", "ibpb", "constant_tsc", "smep"} & set(features)


def test_the_fingerprint_is_stable_and_names_what_engines_depend_on() -> None:
    first = hardware.fingerprint()
    assert first == hardware.fingerprint()
    assert set(first) == {"architecture", "cpu_features", "torch", "compiler"}
    assert first["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_the_compiler_is_the_one_that_cxx_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "some-c++"
    compiler.write_text("#!/bin/sh\necho 'some c++ 1.2.3'\necho more\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert hardware.compiler_version() == "some c++ 1.2.3"
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    assert hardware.compiler_version() == ""


def test_gpus_are_read_from_a_stand_in_for_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '570.1, NVIDIA H100 80GB HBM3, 81559, 9.0'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(hardware, "_gpu_by_nvml", lambda: None)
    device = {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 81559 << 20, "compute_capability": "9.0"}
    assert hardware.gpu() == {"available": True, "reason": "", "driver": "570.1", "devices": [device]}
    tool.write_text("#!/bin/sh\necho 'could not communicate with the driver'; exit 9\n")
    assert not hardware.gpu()["available"]


def test_looking_at_the_machine_imports_no_heavy_package() -> None:
    code = "import sys; from exporter import hardware; hardware.probe(); hardware.fingerprint(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "onnxruntime"} & set(modules)
