"""The TensorRT targets from a graph to a session: the builder, the library and the GPU are faked, the files are not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.artifact import Artifact, Axis, InputContract, Signature, TensorSpec, Variant
from exporter.digests import file_digest
from exporter.errors import EnvironmentLackError, RequestError
from exporter.targets import get_target, tensorrt, tensorrt_engine, tensorrt_session
from exporter.targets.base import Availability
from exporter.targets.engines import FINGERPRINT, sheet_of
from exporter.targets.tensorrt_builder import RTX, TENSORRT, BuiltEngine, EngineOptions, profiles_of
from exporter.targets.tensorrt_engine import engine_fingerprint, misfits, this_machine
from tests.exporter.targets import fake_tensorrt
from tests.exporter.targets.fake_cuda import FakeCuda

SIGNATURE = Signature(
    (TensorSpec("x", "float32", ("batch", 2)),),
    (TensorSpec("y", "float32", ("batch", 2)), TensorSpec("total", "float32", ("batch",))),
    (Axis("batch", 1, 16),),
)
PRETENDED = {
    "available": True,
    "driver": "580.95.05",
    "devices": [
        {"name": "pretended GPU", "compute_capability": "9.0"},
        {"name": "another", "compute_capability": "8.0"},
    ],
}
NAMES = {"tensorrt": TENSORRT, "tensorrt-rtx": RTX}


@pytest.fixture
def graph(tmp_path: Path) -> Artifact:
    folder = tmp_path / "graph"
    folder.mkdir()
    for name in ("model.onnx", "model.onnx_data", "other.onnx_data"):
        (folder / name).write_bytes(name.encode())
    return Artifact(folder / "model.onnx", "onnx", SIGNATURE, InputContract())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A pretended machine with fakes of the libraries; what the fake builder was asked for."""
    asked: dict[str, Any] = {}

    def fake_build(onnx: Path, plan: Path, *, module: str, profiles: Any, options: EngineOptions) -> BuiltEngine:
        asked.update(onnx=onnx, module=module, profiles=profiles, options=options)
        inputs, outputs = (
            {spec.name: (spec.dtype, spec.shape) for spec in specs} for specs in (SIGNATURE.inputs, SIGNATURE.outputs)
        )
        plan.write_bytes(fake_tensorrt.plan("affine", inputs, outputs, profiles, host_code=options.version_compatible))
        return BuiltEngine(plan, fake_tensorrt.VERSION, 1.0, plan.stat().st_size, ())

    monkeypatch.setattr(tensorrt, "build_engine", fake_build)
    monkeypatch.setattr(tensorrt.TensorRtTarget, "availability", lambda *given: Availability(True))
    monkeypatch.setattr(tensorrt_engine, "gpu", lambda: PRETENDED)
    monkeypatch.setattr(tensorrt_engine, "installed_version", lambda *packages: fake_tensorrt.VERSION)
    monkeypatch.setattr(tensorrt_session, "Cuda", FakeCuda)
    for module in NAMES.values():
        monkeypatch.setitem(sys.modules, module, fake_tensorrt.module(module))
    return asked


@pytest.mark.parametrize("name", NAMES)
def test_what_a_fake_builder_made_is_opened_and_runs(
    name: str, graph: Artifact, asked: dict[str, Any], tmp_path: Path
) -> None:
    target, variant = get_target(name), Variant(name, "fp16")
    plan, sheet = target.build(graph, variant, tmp_path)
    assert (asked["onnx"], asked["module"]) == (graph.path, NAMES[name])
    assert asked["profiles"] == profiles_of(SIGNATURE)
    found = json.loads(sheet.read_text())["fingerprint"]
    assert (found["gpus"], found["device"], found["driver"]) == (["9.0"], "pretended GPU", "580.95.05")
    weights = graph.path.parent / "model.onnx_data"
    assert found["onnx"] == {file.name: file_digest(file) for file in (graph.path, weights)}

    engine = Artifact(plan, "onnx", SIGNATURE, InputContract())
    trusted = frozenset([file_digest(plan)])
    session = target.open(engine, variant, threads=1, trusted_digests=trusted)
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.testing.assert_array_equal(session.run({"x": x})["y"], 2 * x + 1)
    assert session.executed()["runtime"] == f"{NAMES[name]} {fake_tensorrt.VERSION}"
    with pytest.raises(RequestError, match="not built by your own cache"):
        target.open(engine, variant, threads=1)


def test_no_library_is_asked_about_an_engine_that_does_not_fit(
    graph: Artifact, asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, variant = get_target("tensorrt"), Variant("tensorrt", "fp16")
    plan, _ = target.build(graph, variant, tmp_path)
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # importing it would be an error of another kind
    trusted = frozenset([file_digest(plan)])
    engine = Artifact(plan, "onnx", SIGNATURE, InputContract())
    with pytest.raises(EnvironmentLackError, match="cannot be imported"):
        target.open(engine, variant, threads=1, trusted_digests=trusted)
    older = PRETENDED | {"driver": "570.1"}
    monkeypatch.setattr(tensorrt_engine, "gpu", lambda: older)
    with pytest.raises(RequestError, match=r"older 570\.1"):
        target.open(engine, variant, threads=1, trusted_digests=trusted)


def test_a_version_compatible_engine_may_run_its_host_code_in_the_fake_library(
    graph: Artifact, asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "EngineOptions", lambda: EngineOptions(version_compatible=True))
    target, variant = get_target("tensorrt"), Variant("tensorrt", "fp16")
    plan, _ = target.build(graph, variant, tmp_path)
    assert sheet_of(plan)["options"] == {"version_compatible": True}
    engine = Artifact(plan, "onnx", SIGNATURE, InputContract())
    session = target.open(engine, variant, threads=1, trusted_digests=frozenset([file_digest(plan)]))
    x = np.ones((1, 2), np.float32)
    np.testing.assert_array_equal(session.run({"x": x})["total"], [2])


def test_a_target_that_cannot_run_here_builds_nothing(
    graph: Artifact, asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = Availability(False, "there is no NVIDIA driver", "Run elsewhere")
    monkeypatch.setattr(tensorrt.TensorRtTarget, "availability", lambda *given: state)
    with pytest.raises(EnvironmentLackError, match="no NVIDIA driver"):
        get_target("tensorrt").build(graph, Variant("tensorrt", "fp16"), tmp_path)
    assert not asked
    assert not (tmp_path / FINGERPRINT).exists()


def test_int8_engines_are_made_from_the_graph_of_tensorrts_form() -> None:
    target = get_target("tensorrt")
    assert target.ingredient(Variant("tensorrt", "int8", "static-smooth")) == "onnx-int8-static-smooth-tensorrt"
    assert target.ingredient(Variant("tensorrt", "fp16")) == "onnx-fp16"


def test_what_this_machine_has_is_asked_of_its_first_pretended_gpu(asked: dict[str, Any]) -> None:
    found = this_machine(TENSORRT)
    assert (found["gpu"], found["device"], found["driver"]) == ("9.0", "pretended GPU", "580.95.05")
    assert found["version"] == fake_tensorrt.VERSION


def test_a_machine_without_a_gpu_or_the_library_fits_no_engine(
    graph: Artifact, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = BuiltEngine(graph.path, "11.4.0.106", 1.0, 1, ())
    found = engine_fingerprint(built, TENSORRT, [graph.path], [], EngineOptions(timeout_s=1.0, timing_cache=graph.path))
    assert found["options"] == {}  # what does not change an engine is not told of it
    monkeypatch.setattr(tensorrt_engine, "gpu", lambda: {"available": False, "driver": None, "devices": []})
    monkeypatch.setattr(tensorrt_engine, "installed_version", lambda *packages: None)
    here = this_machine(TENSORRT)
    assert (here["version"], here["gpu"], here["device"], here["driver"]) == ("", None, None, None)
    told = misfits(found, here)
    assert len(told) == 2
    assert "is not installed here" in told[0]
    assert "a GPU of compute capability 9.0 is needed, and there is none here" in told[1]
