"""The main job with an ONNX file as the source: what it is timed against, what the bundle holds, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines import load
from pipelines.bundle import check_integrity
from tests.pipelines.jobs import TEXTS, manifest, settings

pytestmark = pytest.mark.slow

ORT = "onnxruntime-cpu-fp32"
Here = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def shared_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANISH_CACHE", str(cache))


@pytest.fixture
def source(bundle: Path, tmp_path: Path) -> Path:
    """An encoder as the hub has them: the graph below ``onnx/``, configuration and tokenizer above it."""
    folder = tmp_path / "encoder"
    (folder / "onnx").mkdir(parents=True)
    shutil.copy(bundle / "onnx" / "model.onnx", folder / "onnx")
    for path in bundle.glob("*.json"):
        if path.name not in ("planish.json", "report.json"):
            shutil.copy(path, folder)
    return folder / "onnx" / "model.onnx"


def test_an_onnx_source_is_timed_against_itself(
    source: Path, bundle: Path, texts: Path, here: Here, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = settings("latency.baselines=[eager]")
    status, shown, log = here("export", source, "--out", out, "--data", texts, *asked)
    assert status == 0, log
    written = manifest(out)
    assert (written["name"], written["task"]) == ("encoder", "feature-extraction")
    assert "Speed-ups over the ONNX source" in shown.replace("\n", " ")
    latency = json.loads((out / "evidence" / "latency.json").read_text(encoding="utf-8"))
    assert latency["baseline"] == "onnx"
    assert list(latency["baselines"]) == ["onnx"]
    assert latency["baselines"]["onnx"]["executed"]["provider"] == "CPUExecutionProvider"
    timed = {entry["id"]: entry["points"] for entry in written["variants"] if entry["points"]}
    assert ORT in timed
    for points in timed.values():
        assert points["1x8"]["speedup"] is not None
        assert points["1x8"]["speedup_vs_best_pytorch"] is None
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "vs. source" in page
    assert "eager PyTorch" not in page
    assert "best PyTorch" not in page

    with load(out, variant=ORT) as made, load(bundle, variant=ORT) as first:
        np.testing.assert_allclose(made(list(TEXTS)), first(list(TEXTS)), rtol=0, atol=1e-6)
    shutil.rmtree(source.parent.parent)
    assert check_integrity(out) == []
    assert here("verify", out, "--no-latency")[0] == 0


def test_a_graph_that_takes_no_text_so_long(source: Path, here: Here, tmp_path: Path) -> None:
    """Nothing beside the file says how long a text may be, and 512 tokens are too many for its table of positions."""
    alone = tmp_path / "net.onnx"
    shutil.move(source, alone)
    status, _, log = here("export", alone, "--out", tmp_path / "out", *settings())
    assert status == 2
    assert "does not run with inputs of the shapes input_ids [2, 512]" in log
    assert "export.max_length" in log
    assert not (tmp_path / "out").exists()
    assert here("export", alone, "--out", tmp_path / "out", *settings("export.max_length=64"))[0] == 0


def test_without_baselines_variants_are_compared_with_the_portable_one(
    bundle: Path, model_folder: Callable[..., Path], texts: Path, here: Here, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = settings("latency.baselines=[]")
    assert here("export", model_folder("bert"), "--out", out, "--data", texts, *asked)[0] == 0
    points = {entry["id"]: entry["points"] for entry in manifest(out)["variants"] if entry["points"]}
    assert points[ORT]["1x8"]["speedup"] == pytest.approx(1.0)
    assert points[f"{ORT}-fused"]["1x8"]["speedup"] is not None
    assert f"speed of {ORT}" in (out / "report.html").read_text(encoding="utf-8")
