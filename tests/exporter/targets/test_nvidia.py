"""What the NVIDIA targets say of themselves; a machine with a driver cannot be had here, so that is pretended."""

from pathlib import Path

import pytest

from exporter.artifact import Artifact, InputContract, Signature, Variant
from exporter.errors import EnvironmentLackError
from exporter.targets import get_target, nvidia

NAMES = ("onnxruntime-cuda", "inductor-cuda", "tensorrt", "tensorrt-rtx")


@pytest.mark.parametrize("driver", [False, True], ids=["no driver", "pretended driver"])
@pytest.mark.parametrize("installed", [None, "99.0"], ids=["no package", "pretended package"])
@pytest.mark.parametrize("name", NAMES)
def test_none_promises_that_an_installation_would_make_planish_run_it(
    name: str, installed: str | None, driver: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvidia, "has_driver", lambda: driver)
    monkeypatch.setattr(nvidia, "installed_version", lambda *packages: installed)
    state = get_target(name).availability()
    assert not state.available
    assert state.reason.startswith("this version of Planish does not" if name == "inductor-cuda" else "this version")
    assert "vendor's own runtime" in state.remedy
    assert ("no NVIDIA driver on this machine" in state.reason) is not driver
    assert ("not installed" in state.remedy) is (driver and installed is None)
    assert dict(state.versions) == ({} if installed is None else {get_target(name).packages[0]: "99.0"})


def test_opening_one_is_refused_with_the_same_words(tmp_path: Path) -> None:
    variant = Variant("tensorrt", "fp16")
    artifact = Artifact(tmp_path / "model.onnx", "onnx", Signature((), ()), InputContract())
    with pytest.raises(EnvironmentLackError, match="cannot run here") as caught:
        get_target("tensorrt").open(artifact, variant, threads=1)
    assert caught.value.remedy == get_target("tensorrt").availability().remedy
