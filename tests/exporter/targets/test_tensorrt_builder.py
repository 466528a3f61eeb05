"""The TensorRT builder with the real TensorRT for RTX, which builds without a GPU. Skips without the package."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from exporter.artifact import Axis, Signature, TensorSpec
from exporter.errors import EnvironmentLackError, InternalError, NoSpaceError, RequestError
from exporter.targets import tensorrt_builder
from exporter.targets.nvidia import has_driver
from exporter.targets.tensorrt_builder import (
    RTX,
    TENSORRT,
    EngineLayer,
    EngineOptions,
    OptionError,
    build_engine,
    profiles_of,
)
from exporter.targets.tensorrt_child import layers
from tests.exporter.targets.tensorrt_graphs import ADA, WIDTH, needs_rtx, product

PROFILES = [{"x": ((1, WIDTH), (8, WIDTH), (64, WIDTH))}]
TEXT = Signature(
    (TensorSpec("ids", "int64", ("batch", "sequence")), TensorSpec("table", "float32", ("batch", 4))),
    (TensorSpec("y", "float32", ("batch",)),),
    (Axis("batch", 1, 64), Axis("sequence", 2, 512)),
)


def build(onnx_file: Path, options: EngineOptions = ADA, **more: object) -> tensorrt_builder.BuiltEngine:
    plan = onnx_file.with_suffix(".plan")
    return build_engine(onnx_file, plan, module=RTX, profiles=PROFILES, options=options, **more)  # type: ignore[arg-type]


def test_one_profile_spans_the_envelope_and_is_made_for_the_largest_point() -> None:
    points = [{"batch": 4, "sequence": 128}, {"batch": 1, "sequence": 64}]
    assert profiles_of(TEXT, points) == [
        {"ids": ((1, 2), (4, 128), (64, 512)), "table": ((1, 4), (4, 4), (64, 4))},
    ]
    assert [profile["ids"][1] for profile in profiles_of(TEXT)] == [(64, 512)]


def test_points_far_apart_have_profiles_of_their_own() -> None:
    points = [{"batch": 64, "sequence": 512}, {"batch": 1, "sequence": 16}, {"batch": 1, "sequence": 256}]
    assert [profile["ids"] for profile in profiles_of(TEXT, points)] == [
        ((1, 2), (1, 256), (64, 512)),
        ((1, 2), (64, 512), (64, 512)),
    ]


def test_a_point_beyond_the_envelope_is_taken_at_its_border() -> None:
    assert profiles_of(TEXT, [{"batch": 100, "sequence": 1}])[0]["ids"][1] == (64, 2)


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["SM89", "SM120"])
def test_an_engine_is_built_for_a_gpu_that_is_not_there(tmp_path: Path, gpu: str) -> None:
    said: list[str] = []
    path = product(tmp_path / "model.onnx")
    built = build(path, EngineOptions(compute_capabilities=(gpu,)), on_progress=said.append)
    assert built.plan.stat().st_size == built.bytes > 0
    assert [layer.inputs[0] for layer in built.layers if layer.kind == "gemm"] == ["Float"]
    assert built.warnings == ()
    assert built.version
    assert all(text.endswith(" s") for text in said)


@needs_rtx
@pytest.mark.slow
def test_options_that_the_version_lacks_are_refused(tmp_path: Path) -> None:
    path = product(tmp_path / "model.onnx")
    with pytest.raises(OptionError, match=r"compute_capabilities \(SM90; it builds for .*SM89"):
        build(path, EngineOptions(compute_capabilities=("SM90",)))
    asked = EngineOptions(compute_capabilities=("SM89",), hardware_compatible="AMPERE_PLUS")
    with pytest.raises(OptionError, match=r"hardware_compatible \(it is there, and without effect\)"):
        build(path, asked)


def test_a_library_that_crashes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that really kills itself stands for the library's segfault, which cannot be had at will."""
    child = tmp_path / "child.py"
    child.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setattr(tensorrt_builder.tensorrt_child, "__file__", str(child))
    with pytest.raises(InternalError, match=f"signal {int(signal.SIGSEGV)}"):
        build(product(tmp_path / "model.onnx"))


@pytest.mark.parametrize(
    ("limit", "told"),
    [
        ({"timeout_s": 0.5}, "not built within the time allowed: 0.5 s"),
        ({"memory_bytes": 100_000_000}, "more memory than is allowed"),
    ],
)
def test_a_build_beyond_its_limits_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: dict[str, float], told: str
) -> None:
    """A child of the test's own: no library takes long, or much memory, at will."""
    child = tmp_path / "child.py"
    child.write_text("import time\nheld = bytearray(b'x') * 200_000_000\ntime.sleep(600)\n")
    monkeypatch.setattr(tensorrt_builder.tensorrt_child, "__file__", str(child))
    with pytest.raises(EnvironmentLackError, match=told):
        build(product(tmp_path / "model.onnx"), replace(ADA, **limit))  # type: ignore[arg-type]
    found = subprocess.run(["pgrep", "-f", str(child)], capture_output=True, text=True, check=False)
    assert found.stdout.split() == []


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="tensorrt is installed here")
def test_without_the_library_it_says_how_to_get_it(tmp_path: Path) -> None:
    path = product(tmp_path / "model.onnx")
    with pytest.raises(EnvironmentLackError, match="tensorrt cannot be imported") as caught:
        build_engine(path, tmp_path / "plan", module=TENSORRT, profiles=PROFILES)
    assert "docs/targets.md" in str(caught.value.remedy)


def test_what_no_version_takes_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="optimization level: 9"):
        EngineOptions(level=9)
    with pytest.raises(RequestError, match="workspace: 0"):
        EngineOptions(workspace_bytes=0)


@pytest.mark.skipif(has_driver(), reason="there may be a GPU here")
def test_without_a_gpu_one_has_to_be_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no GPU is named"):
        build(product(tmp_path / "model.onnx"), EngineOptions())


@needs_rtx
@pytest.mark.slow
def test_what_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(RequestError, match="cannot read the graph"):
        build(tmp_path / "model.onnx")


def test_a_full_disk_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that ends as the real one does where a write finds no space."""
    child = tmp_path / "child.py"
    child.write_text(f"import sys\nsys.exit({tensorrt_builder.tensorrt_child.DISK_FULL})\n")
    monkeypatch.setattr(tensorrt_builder.tensorrt_child, "__file__", str(child))
    with pytest.raises(NoSpaceError):
        build(product(tmp_path / "model.onnx"))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such ONNX file"):
        build(tmp_path / "none.onnx")


def test_layers_are_read_from_the_builder_s_list() -> None:
    text = (
        "Name: encoder/MatMul_myl0_2, LayerType: gemm, Inputs: [ { Name: a, Dimensions: [-1,8], Datatype: Int8, "
        "Format: x }, { Name: b, Datatype: Float, Format: x }], "
        "Constants: [ { Name: c, Datatype: Half }], Outputs: []\n"
        "Something else\n"
        "Name: shape, LayerType: shape_call, Inputs: [], Constants: [], Outputs: []"
    )
    assert layers(text) == [
        {"name": "encoder/MatMul_myl0_2", "kind": "gemm", "inputs": ["Int8", "Float"]},
        {"name": "shape", "kind": "shape_call", "inputs": []},
    ]


@pytest.mark.parametrize(
    ("name", "kind", "inputs", "product"),
    [
        ("encoder/MatMul_myl0_2", "gemm", ("Int8", "Float"), "Int8"),
        ("features/Conv_myl0_2", "correlation", ("Half",), "Half"),
        ("_gemm_mha_v2_myl0_9", "kgen", ("Int8", "Int8", "Float", "Int8"), "Int8"),
        ("__myl_FcAddDivErfAddMulMul_myl0_24", "runtime_fusion", ("Half",), "Half"),
        ("__myl_FcAdd_myl0_26", "runtime_fusion", ("Half", "Float"), "Half"),
        ("__myl_CastMulFc_myl0_5", "runtime_fusion", ("Int8", "Float"), "Float"),
        ("__myl_MulAddReshTran_myl0_15", "kgen", ("Float",), None),
        ("shape", "shape_call", (), None),
    ],
)
def test_what_a_layer_multiplies(name: str, kind: str, inputs: tuple[str, ...], product: str | None) -> None:
    assert EngineLayer(name, kind, inputs).product == product
