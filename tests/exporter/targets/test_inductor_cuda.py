"""What is asked of an AOTInductor package for a GPU before any of it is loaded, and of one that was just compiled.

The machine that a package fits is only told to be here: there is no GPU.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.artifact import Artifact, Axis, InputContract, Signature, TensorSpec, Variant
from exporter.digests import file_digest
from exporter.errors import EnvironmentLackError, RequestError
from exporter.targets import get_target, inductor, inductor_cuda
from exporter.targets.base import Availability, BuildHow
from exporter.targets.engines import FINGERPRINT, write_sheet
from exporter.targets.inductor_cuda import InductorCudaSession, check_engine, cuda_fingerprint, misfits
from tests.exporter.targets.fake_cuda import FakeCuda

HERE: dict[str, Any] = {
    "architecture": "x86_64",
    "torch": "2.13.0+cu130",
    "cpu_features": ["avx2", "fma"],
    "compiler": "g++ 13.3.0",
    "cuda": "13.0",
    "gpu": "9.0",
    "shapes": {},
    "device": "NVIDIA H100 80GB HBM3",
}
SIGNATURE = Signature(
    (TensorSpec("x", "float32", ("batch", 2)), TensorSpec("w", "float32", ("batch", 2))),
    (TensorSpec("y", "float32", ("batch", 2)),),
    (Axis("batch", 1, 8),),
)
VARIANT = Variant("inductor-cuda", "fp16")


def test_a_package_of_this_machine_fits() -> None:
    assert misfits(HERE, HERE) == []


@pytest.mark.parametrize(
    ("built", "here", "told"),
    [
        ({"architecture": "aarch64"}, {}, "architecture: built for aarch64, here it is x86_64"),
        ({"torch": "2.12.0+cu130"}, {}, "torch: built for 2.12.0+cu130, here it is 2.13.0+cu130"),
        ({"cpu_features": ["amx", "avx2"]}, {}, "processor features that this machine lacks: amx"),
        ({"cuda": "12.8"}, {}, "CUDA: built for 12.8, here torch has 13.0"),
        ({}, {"cuda": None}, "CUDA: built for 13.0, here torch has none"),
        ({"gpu": "8.9"}, {}, "GPU: built for compute capability 8.9, here it is 9.0"),
        ({}, {"gpu": None, "device": None}, "a GPU of compute capability 9.0 is needed, and there is none here"),
    ],
)
def test_each_field_that_does_not_fit_is_named(built: dict[str, Any], here: dict[str, Any], told: str) -> None:
    assert misfits(HERE | built, HERE | here) == [told]


@pytest.mark.parametrize(
    ("built", "here"),
    [
        ({"device": "NVIDIA H200"}, {}),
        ({"compiler": "clang 20"}, {}),
        ({}, {"cpu_features": ["avx2", "avx512f", "fma"]}),
    ],
)
def test_what_does_not_matter_keeps_no_package_from_running(built: dict[str, Any], here: dict[str, Any]) -> None:
    assert misfits(HERE | built, HERE | here) == []


def test_all_that_differs_is_told_at_once() -> None:
    built = HERE | {"architecture": "aarch64", "torch": "1", "cpu_features": ["sve"], "cuda": "1.0", "gpu": "1.0"}
    assert len(misfits(built, HERE)) == 5


def test_the_fingerprint_of_a_machine_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor_cuda, "gpu", lambda: {"available": False, "devices": []})
    found = cuda_fingerprint()
    assert set(HERE) - {"shapes"} <= set(found)
    assert (found["gpu"], found["device"]) == (None, None)
    assert "there is none here" in misfits(HERE, found)[-1]


def test_the_fingerprint_has_the_first_gpu_pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [{"name": name, "compute_capability": version} for name, version in (("one", "8.9"), ("two", "9.0"))]
    monkeypatch.setattr(inductor_cuda, "gpu", lambda: {"available": True, "devices": devices})
    found = cuda_fingerprint()
    assert (found["gpu"], found["device"]) == ("8.9", "one")


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the pretended machine; nothing may load it."""

    def loaded(*arguments: Any, **more: Any) -> None:
        raise AssertionError("a package was loaded that had been refused")

    monkeypatch.setattr(inductor, "Package", loaded)
    monkeypatch.setattr(inductor_cuda, "Cuda", loaded)
    monkeypatch.setattr(inductor_cuda, "cuda_fingerprint", lambda: HERE)
    monkeypatch.setattr(inductor_cuda.InductorCuda, "availability", lambda *given: Availability(True))
    path = tmp_path / "model.pt2"
    path.write_bytes(b"native code")
    write_sheet(path, HERE)
    return path


def refused(path: Path, told: str, *, trusted: bool = True) -> None:
    """Both the check and opening refuse it."""
    digests = frozenset([file_digest(path)] if trusted else [])
    with pytest.raises(RequestError, match=told):
        check_engine(path, digests)
    artifact = Artifact(path, "pt2", SIGNATURE, InputContract())
    with pytest.raises(RequestError, match=told):
        get_target("inductor-cuda").open(artifact, VARIANT, threads=1, trusted_digests=digests)


def test_a_trusted_package_may_be_opened_and_no_other(engine: Path) -> None:
    check_engine(engine, frozenset([file_digest(engine)]))
    refused(engine, "not built by your own cache", trusted=False)


def test_a_package_that_passes_the_checks_is_what_is_opened(engine: Path) -> None:
    artifact = Artifact(engine, "pt2", SIGNATURE, InputContract())
    with pytest.raises(AssertionError, match="was loaded"):
        get_target("inductor-cuda").open(artifact, VARIANT, threads=1, trusted_digests=frozenset([file_digest(engine)]))


def test_a_changed_package_is_refused_even_if_it_is_trusted(engine: Path) -> None:
    engine.write_bytes(b"native codE")
    refused(engine, "not the file that its fingerprint names")


def test_a_foreign_package_is_refused_even_if_it_is_trusted(engine: Path) -> None:
    write_sheet(engine, HERE | {"gpu": "8.9"})
    refused(engine, "built for another machine: GPU: built for compute capability 8.9")


@pytest.mark.parametrize("name", ["architecture", "torch", "cpu_features", "cuda", "gpu", "shapes"])
@pytest.mark.parametrize("value", [None, 9.0], ids=["left out", "of another type"])
def test_a_fingerprint_with_a_field_that_is_none_is_damaged(engine: Path, name: str, value: Any) -> None:
    write_sheet(engine, {key: found for key, found in HERE.items() if key != name} | ({name: value} if value else {}))
    refused(engine, "fingerprint of an engine is damaged")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"fingerprint": [], "sha256": "0"}', "\x00"])
def test_a_sheet_that_is_none_is_damaged(engine: Path, text: str) -> None:
    (engine.parent / FINGERPRINT).write_text(text)
    refused(engine, "fingerprint of an engine is damaged")


def test_features_that_are_none_are_damage(engine: Path) -> None:
    write_sheet(engine, HERE | {"cpu_features": [["avx2"]]})
    refused(engine, "fingerprint of an engine is damaged")


def test_a_package_without_a_fingerprint_is_refused(engine: Path) -> None:
    (engine.parent / FINGERPRINT).unlink()
    refused(engine, "missing")


def interpreter(folder: Path, body: str) -> str:
    """A program that stands for Python."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
def test_a_package_that_crashes_when_it_is_loaded_is_told_with_the_compiler(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    crash = f"echo terminate called; ulimit -c 0; kill -{int(number)} $$"
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path, crash))
    monkeypatch.setenv("CXX", "/opt/odd/g++")
    with pytest.raises(EnvironmentLackError, match="crashes when it is loaded") as caught:
        inductor_cuda._probe(tmp_path / "model.pt2")
    assert f"signal {int(number)}; compiled by /opt/odd/g++" in str(caught.value)
    assert "CXX=/usr/bin/g++" in str(caught.value)
    assert "terminate called" in capfd.readouterr().err


def test_a_package_that_is_none_is_told_with_the_words_of_torch(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "model.pt2"
    package.write_bytes(b"no archive")
    with pytest.raises(EnvironmentLackError, match="cannot be loaded") as caught:
        inductor_cuda._probe(package)
    told = capfd.readouterr().err
    assert "Traceback" in told
    assert "AOTIModelPackageLoader" in told
    assert caught.value.value == told.strip().splitlines()[-1].strip()[:300]


def test_a_package_that_never_finishes_loading_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path, "exec sleep 60"))
    monkeypatch.setattr(inductor_cuda, "PROBE_SECONDS", 0.2)
    with pytest.raises(EnvironmentLackError, match="does not load"):
        inductor_cuda._probe(tmp_path / "model.pt2")


def test_a_package_that_loads_passes_and_finds_our_code_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tmp_path / "seen"
    monkeypatch.setattr(
        sys, "executable", interpreter(tmp_path, f'echo "$PYTHONPATH" > {seen}; echo "$1 $4" >> {seen}')
    )
    inductor_cuda._probe(tmp_path / "model.pt2")
    path, package = seen.read_text().splitlines()
    assert any((Path(part) / "exporter" / "targets").is_dir() for part in path.split(os.pathsep))
    assert package == f"-P {tmp_path / 'model.pt2'}", "code of the folder that somebody works in would be found first"


class FakePackage:
    """A package that takes and gives tensors in an order of its own, as those of torch do."""

    inputs = ("w", "x")
    outputs = ("y",)

    def __init__(self, path: Path, *, single_threaded: bool = False) -> None:
        assert single_threaded, "events by which runners take turns cannot be captured"

    def run(self, tensors: list[Any]) -> list[Any]:
        w, x = tensors
        return [x - 2 * w]


def test_a_fake_package_is_given_its_inputs_in_its_own_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "Package", FakePackage)
    monkeypatch.setattr(inductor_cuda, "Cuda", FakeCuda)
    kinds = frozenset(["float16", "float32", "int64"])
    monkeypatch.setattr(inductor, "compiled_types", lambda path: kinds)
    session = InductorCudaSession(Artifact(tmp_path / "model.pt2", "pt2", SIGNATURE, InputContract()), "fp16")
    x, w = np.ones((3, 2), np.float32), np.arange(6, dtype=np.float32).reshape(3, 2)
    np.testing.assert_array_equal(session.run({"x": x, "w": w})["y"], x - 2 * w)
    binding = session.bind({"x": x, "w": w})
    binding.run()
    np.testing.assert_array_equal(binding.host_outputs()["y"], x - 2 * w)
    executed = session.executed()
    assert (executed["precision"], executed["gpu"], executed["cuda_graphs"]) == ("fp16", "fake GPU", "captured")


@pytest.mark.parametrize(
    ("precision", "kinds", "told"),
    [
        ("fp32", {"float32", "int64"}, "fp32"),
        ("fp32", {"float32", "float16"}, "mixed"),
        ("fp16", {"float16"}, "fp16"),
        ("fp16", {"float32"}, "mixed"),
        ("bf16", {"float16", "bfloat16"}, "mixed"),
        ("bf16", {"bfloat16", "float32"}, "bf16"),
        ("fp16", set(), "unknown"),
    ],
)
def test_what_a_fake_package_ran_in_is_read_from_what_was_compiled(
    precision: str, kinds: set[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor, "Package", FakePackage)
    monkeypatch.setattr(inductor_cuda, "Cuda", FakeCuda)
    monkeypatch.setattr(inductor, "compiled_types", lambda path: frozenset(kinds))
    session = InductorCudaSession(Artifact(tmp_path / "model.pt2", "pt2", SIGNATURE, InputContract()), precision)
    assert session.executed()["precision"] == told


@pytest.mark.parametrize(("form", "models"), [(None, {}), ("shaped", {"point0": [1, 8], "point1": [4, 16]})])
def test_kernels_for_all_shapes_are_chosen_at_the_largest_operating_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str | None, models: dict[str, list[int]]
) -> None:
    """Without a GPU: what is compiled is pretended, how it is asked for is not."""
    import torch._inductor.package

    signature = Signature(
        (TensorSpec("ids", "int64", ("batch", "sequence")),),
        (TensorSpec("y", "float32", ("batch",)),),
        (Axis("batch", 1, 8), Axis("sequence", 1, 64)),
    )
    asked: dict[str, Any] = {}

    def compiles(program: Path, folder: Path, **how: Any) -> list[str]:
        asked[folder.name] = how
        return []

    monkeypatch.setattr(inductor, "compile_program", compiles)
    monkeypatch.setattr(inductor_cuda, "_probe", lambda package: None)
    monkeypatch.setattr(inductor_cuda.InductorCuda, "availability", lambda *given: Availability(True))
    monkeypatch.setattr(torch._inductor.package, "package_aoti", lambda path, files: Path(path).write_bytes(b"code"))
    points = ({"batch": 1, "sequence": 8}, {"batch": 4, "sequence": 16})
    target, variant = get_target("inductor-cuda"), Variant("inductor-cuda", "fp16", form)
    target.build(Artifact(tmp_path / "p.pt2", "pt2", signature, InputContract()), variant, tmp_path, BuildHow(points))
    assert asked.pop("compile-model") == {"device": "cuda", "shapes": None, "tuned_for": {"ids": [4, 16]}}
    assert asked == {
        f"compile-{name}": {"device": "cuda", "shapes": {"ids": shape}, "tuned_for": None}
        for name, shape in models.items()
    }
    assert target.depends_on(variant, BuildHow(points)) != target.depends_on(variant, BuildHow(points[:1]))
