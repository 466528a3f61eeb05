"""What the NVIDIA targets say of themselves; a machine with a driver cannot be had here, so that is pretended."""

from pathlib import Path

import pytest

from exporter.artifact import Artifact, InputContract, Signature, Variant
from exporter.errors import EnvironmentLackError
from exporter.targets import get_target, nvidia, tensorrt

NAMES = ("onnxruntime-cuda", "inductor-cuda", "tensorrt", "tensorrt-rtx")


def pretend(monkeypatch: pytest.MonkeyPatch, *, driver: bool, installed: str | None, capability: str = "8.9") -> None:
    monkeypatch.setattr(nvidia, "has_driver", lambda: driver)
    monkeypatch.setattr(nvidia, "installed_version", lambda *packages: installed)
    monkeypatch.setattr(nvidia, "torch_cuda", lambda: "13.0")
    devices = [{"name": "pretended", "compute_capability": capability}] if driver else []
    monkeypatch.setattr(tensorrt, "gpu", lambda: {"devices": devices})


@pytest.mark.parametrize("driver", [False, True], ids=["no driver", "pretended driver"])
@pytest.mark.parametrize("installed", [None, "99.0"], ids=["no package", "pretended package"])
@pytest.mark.parametrize("name", NAMES)
def test_each_says_all_that_is_missing_and_how_to_get_it(
    name: str, installed: str | None, driver: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, driver=driver, installed=installed)
    target = get_target(name)
    state = target.availability()
    assert state.available is (driver and installed is not None)
    assert ("no NVIDIA driver on this machine" in state.reason) is not driver
    assert ("NVIDIA GPU and its driver" in state.remedy) is not driver
    assert (f"{target.packages[0]} is not installed" in state.reason) is (installed is None)
    assert (target.install in state.remedy) is (installed is None)
    assert dict(state.versions) == ({} if installed is None else {target.packages[0]: "99.0"})


def test_a_torch_without_cuda_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, driver=True, installed="2.13.0")
    monkeypatch.setattr(nvidia, "torch_cuda", lambda: None)
    state = get_target("inductor-cuda").availability()
    assert not state.available
    assert state.reason == "torch was built without CUDA"
    assert "CUDA build of torch" in state.remedy


@pytest.mark.parametrize(("capability", "runs"), [("8.9", True), ("12.1", True), ("13.0", True), ("9.0", False)])
def test_tensorrt_for_rtx_does_not_run_on_gpus_of_data_centres(
    capability: str, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, driver=True, installed="1.7.1.116", capability=capability)
    state = get_target("tensorrt-rtx").availability()
    assert state.available is runs
    assert runs or capability in state.reason


def test_the_cuda_version_of_torch_is_read_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setattr(
        nvidia.importlib.util, "find_spec", lambda name: type("S", (), {"origin": package / "__init__.py"})
    )
    for text, wanted in (
        ("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", "13.0"),
        ('cuda = "12.8"\n', "12.8"),
        ("cuda: Optional[str] = None\n", None),
    ):
        (package / "version.py").write_text(text)
        assert nvidia.torch_cuda() == wanted


@pytest.mark.parametrize("name", NAMES)
def test_opening_one_is_refused_with_the_same_words(name: str, tmp_path: Path) -> None:
    target = get_target(name)
    state = target.availability()
    if state.available:
        pytest.skip("this machine has what the target needs")
    artifact = Artifact(tmp_path / "model.onnx", "onnx", Signature((), ()), InputContract())
    with pytest.raises(EnvironmentLackError, match="cannot run here") as caught:
        target.open(artifact, Variant(name, "fp16"), threads=1)
    assert caught.value.remedy == state.remedy
