"""What is asked of a TensorRT engine before any of it is loaded. Engines here are bytes: no check reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exporter.digests import file_digest
from exporter.errors import RequestError
from exporter.targets import tensorrt_engine
from exporter.targets.engines import FINGERPRINT, write_sheet
from exporter.targets.tensorrt_builder import RTX, TENSORRT, BuiltEngine, EngineOptions
from exporter.targets.tensorrt_engine import capability_of, check_engine, engine_fingerprint, misfits

HERE = {
    "version": "11.4.0.106",
    "platform": "linux x86_64",
    "gpu": "9.0",
    "device": "NVIDIA H100 80GB HBM3",
    "driver": "580.95.05",
}
BUILT: dict[str, Any] = {
    "library": TENSORRT,
    "version": "11.4.0.106",
    "platform": "linux x86_64",
    "gpus": ["9.0"],
    "device": "NVIDIA H100 80GB HBM3",
    "driver": "580.95.05",
    "options": {},
    "profiles": [],
    "onnx": {"model.onnx": "0" * 64},
}


def test_an_engine_of_this_machine_fits() -> None:
    assert misfits(BUILT, HERE) == []


@pytest.mark.parametrize(
    ("built", "here", "told"),
    [
        ({"version": "11.3.0.99"}, {}, "built with 11.3.0.99, here it is 11.4.0.106"),
        ({"version": "10.16.1.11", "options": {"version_compatible": True}}, {}, "built with 10.16.1.11"),
        ({"version": "11.5.0", "options": {"version_compatible": True}}, {}, "built with 11.5.0"),
        ({}, {"version": ""}, "tensorrt 11.4.0.106 is needed, and is not installed here"),
        ({"platform": "linux aarch64"}, {}, "platform: built for linux aarch64"),
        ({"gpus": ["8.9", "12.0"]}, {}, "compute capability 8.9 or 12.0, here it is 9.0"),
        ({"gpus": ["8.0"], "options": {"hardware_compatible": "SAME_COMPUTE_CAPABILITY"}}, {}, "8.0, here it is 9.0"),
        ({"options": {"hardware_compatible": "AMPERE_PLUS"}}, {"gpu": "7.5"}, "here it is 7.5"),
        ({"device": "NVIDIA H200"}, {}, "built on NVIDIA H200, here it is NVIDIA H100"),
        ({"driver": "590.10"}, {}, "built with 590.10, here it is the older 580.95.05"),
        ({}, {"gpu": None, "device": None, "driver": None}, "a GPU of compute capability 9.0 is needed"),
    ],
)
def test_each_field_that_does_not_fit_is_named(built: dict[str, Any], here: dict[str, Any], told: str) -> None:
    found = misfits(BUILT | built, HERE | here)
    assert len(found) == 1
    assert told in found[0]


@pytest.mark.parametrize(
    ("built", "here"),
    [
        ({"version": "11.3.0.99", "options": {"version_compatible": True}}, {}),
        ({"gpus": ["8.0"], "device": "NVIDIA A100", "options": {"hardware_compatible": "AMPERE_PLUS"}}, {}),
        ({"device": "NVIDIA H200", "options": {"hardware_compatible": "SAME_COMPUTE_CAPABILITY"}}, {}),
        ({"gpus": ["8.9", "9.0"], "device": None, "driver": None}, {}),
        ({"driver": "575.0"}, {}),
    ],
)
def test_what_is_wider_than_needed_fits(built: dict[str, Any], here: dict[str, Any]) -> None:
    assert misfits(BUILT | built, HERE | here) == []


def test_all_that_differs_is_told_at_once() -> None:
    assert len(misfits(BUILT | {"version": "1", "platform": "windows", "gpus": ["7.5"], "driver": "999"}, HERE)) == 4


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine of a machine that is only told to be here: there is no GPU."""
    monkeypatch.setattr(tensorrt_engine, "this_machine", lambda module: HERE)
    path = tmp_path / "model.plan"
    path.write_bytes(b"native code")
    write_sheet(path, BUILT)
    return path


def test_a_trusted_engine_may_be_opened_and_no_other(engine: Path) -> None:
    check_engine(engine, frozenset([file_digest(engine)]))
    with pytest.raises(RequestError, match="not built by your own cache"):
        check_engine(engine, frozenset())


def test_a_changed_engine_is_refused_even_if_it_is_trusted(engine: Path) -> None:
    engine.write_bytes(b"native codE")
    with pytest.raises(RequestError, match="not the file that its fingerprint names"):
        check_engine(engine, frozenset([file_digest(engine)]))


def test_a_foreign_engine_is_refused_even_if_it_is_trusted(engine: Path) -> None:
    write_sheet(engine, BUILT | {"gpus": ["7.5"]})
    with pytest.raises(RequestError, match="built for another machine") as caught:
        check_engine(engine, frozenset([file_digest(engine)]))
    assert "7.5" in str(caught.value)


@pytest.mark.parametrize("name", ["library", "version", "platform", "gpus", "options", "profiles", "onnx"])
def test_a_fingerprint_without_a_field_is_damaged(engine: Path, name: str) -> None:
    write_sheet(engine, {key: value for key, value in BUILT.items() if key != name})
    with pytest.raises(RequestError, match="fingerprint of an engine is damaged"):
        check_engine(engine, frozenset([file_digest(engine)]))


@pytest.mark.parametrize(
    "change", [{"gpus": [9]}, {"gpus": [None]}, {"version": "", "options": {"version_compatible": True}}, {"driver": 5}]
)
def test_nonsense_in_a_field_ends_in_a_refusal(engine: Path, change: dict[str, Any]) -> None:
    write_sheet(engine, BUILT | change)
    with pytest.raises(RequestError):
        check_engine(engine, frozenset([file_digest(engine)]))


def test_an_engine_without_a_fingerprint_is_refused(engine: Path) -> None:
    (engine.parent / FINGERPRINT).unlink()
    with pytest.raises(RequestError, match="missing"):
        check_engine(engine, frozenset([file_digest(engine)]))


def test_the_fingerprint_of_an_engine_for_named_gpus(tmp_path: Path) -> None:
    files = [tmp_path / "model.onnx", tmp_path / "model.onnx_data"]
    for file in files:
        file.write_bytes(file.suffix.encode())
    built = BuiltEngine(tmp_path / "model.plan", "1.7.1.116", 1.0, 11, ())
    profiles = [{"x": ((1, 2), (8, 2), (64, 2))}]
    options = EngineOptions(compute_capabilities=("SM89", "SM120"), sparse_weights=True, timeout_s=5.0)
    found = engine_fingerprint(built, RTX, files, profiles, options)
    assert found["gpus"] == ["8.9", "12.0"]
    assert found["options"] == {"sparse_weights": True}
    assert found["profiles"] == [{"x": [[1, 2], [8, 2], [64, 2]]}]
    assert found["onnx"] == {file.name: file_digest(file) for file in files}
    assert "device" not in found
    assert set(tensorrt_engine.FIELDS) <= set(found)


def test_compute_capabilities() -> None:
    assert [capability_of(name) for name in ("SM75", "SM90", "SM120")] == ["7.5", "9.0", "12.0"]
