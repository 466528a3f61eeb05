"""Int8 and FP8 for TensorRT in the main job, without a GPU: the files are made and their numbers judged."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from exporter.artifact import Variant
from exporter.digests import file_digest
from exporter.errors import EnvironmentLackError, RequestError
from exporter.targets import get_target, tensorrt
from exporter.targets.nvidia import has_driver
from exporter.targets.tensorrt import TensorRtRtx
from pipelines.judging import Judged
from pipelines.plan import PORTABLE_FILES, Candidate, candidates, ingredients, refuse_unoffered
from pipelines.quantizing import needs
from pipelines.recipe import Recipe
from pipelines.stages.check import as_asked
from tests.pipelines.jobs import export, manifest, planish, texts_file

Folders = Callable[..., Path]
NVIDIA = ("targets=[onnxruntime-cpu, tensorrt, tensorrt-rtx]", "precisions=[fp32, int8, fp8]")
SMOOTH = "int8-static-smooth"

without_driver = pytest.mark.skipif(has_driver(), reason="the targets may run here")


def test_forms_of_the_recipe() -> None:
    def planned(**fields: object) -> set[str]:
        found = candidates(Recipe(source="a", targets=["tensorrt", "tensorrt-rtx"], **fields), traceable=True)
        assert {c.ingredient for c in found} <= set(PORTABLE_FILES)  # or nothing would be made without a GPU
        assert ingredients(found) == {c.ingredient for c in found}
        return {c.variant.id for c in found if c.variant.precision not in ("fp32", "fp16", "bf16")}

    assert planned() == {f"tensorrt-{SMOOTH}", f"tensorrt-rtx-{SMOOTH}"}
    assert planned(forms="all") == planned() | {"tensorrt-int8-static", "tensorrt-rtx-int8-static"}
    assert planned(precisions=["fp32", "fp8"]) == {"tensorrt-fp8", "tensorrt-rtx-fp8"}
    assert planned(precisions=["fp32"]) == set()


def test_what_fp8_is_made_from() -> None:
    assert get_target("tensorrt").ingredient(Variant("tensorrt", "fp8")) == "onnx-fp8"
    assert needs("onnx-fp8") == "onnx-fp32"


def test_no_two_ingredients_share_a_file() -> None:
    assert len(set(PORTABLE_FILES.values())) == len(PORTABLE_FILES)


def test_good_numbers_are_no_run() -> None:
    """A variant that cannot run here is skipped, however good its numbers are; bad ones fail it."""
    candidate = Candidate(Variant("tensorrt", "fp8"), "onnx-fp8", False, skip="no driver", remedy="Get one")
    gates = {name: {"verdict": "passed", "reason": "good"} for name in ("parity", "quality")}
    assert Judged(candidate, gates=gates).status == ("skipped", "no driver. Get one")
    failed = {**gates, "quality": {"verdict": "failed", "reason": "bad"}}
    assert Judged(candidate, gates=failed).status == ("failed", "quality: bad")


def test_what_ran_wider_than_asked_fails_but_an_emulation_says_so() -> None:
    parity = {"verdict": "passed", "reason": "good"}
    assert as_asked(parity, {"precision": "fp32", "emulates": "fp8"}, "fp8") == parity
    assert as_asked(parity, {"precision": "fp8"}, "fp8") == parity
    assert as_asked(parity, {"precision": "fp32"}, "fp8")["verdict"] == "failed"
    assert as_asked(parity, {"precision": "fp32", "emulates": "int8"}, "fp8")["verdict"] == "failed"
    assert as_asked(parity, {"precision": "fp32"}, "fp16") == parity


@pytest.mark.slow
@without_driver
def test_bundle_with_int8_and_fp8_for_tensorrt(model_folder: Folders, cache: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    learned = texts_file(tmp_path / "learn.jsonl", [f"This is sentence number {i}." for i in range(40)])
    asked = (*NVIDIA, f"calibration.data={learned}", "calibration.samples=24", "calibration.method=percentile")
    done = export(model_folder("bert"), out, cache, *asked, options=["--data", texts])
    assert done.returncode == 0, done.stderr
    by_id = {entry["id"]: entry for entry in manifest(out)["variants"]}
    files = {SMOOTH: "onnx/model_int8_tensorrt.onnx", "fp8": "onnx/model_fp8.onnx"}
    precision = json.loads((out / "evidence" / "precision.json").read_text(encoding="utf-8"))
    quality = json.loads((out / "evidence" / "quality.json").read_text(encoding="utf-8"))["variants"]
    parity = json.loads((out / "evidence" / "parity.json").read_text(encoding="utf-8"))
    for form, place in files.items():
        onnx.checker.check_model(str(out / place), full_check=True)
        assert {node.domain for node in onnx.load(out / place).graph.node} == {""}
        for target in ("tensorrt", "tensorrt-rtx"):
            entry = by_id[f"{target}-{form}"]
            assert entry["files"] == [place]
            assert entry["status"] == "skipped"
            assert "no NVIDIA driver on this machine" in entry["reason"]
            assert entry["executed"] is None
            assert {name: gate["verdict"] for name, gate in entry["gates"].items()} == {
                "parity": "passed",
                "quality": "passed",
            }
            told = f"{form.split('-')[0]} emulated"
            assert parity[entry["id"]]["runner"].startswith(told)
            assert quality[entry["id"]]["runner"].startswith(told)
            assert quality[entry["id"]]["samples"] == 12
            (error,) = {o["rms_relative"] for n, o in parity[entry["id"]]["outputs"].items() if "embedding" in n}
            assert 1e-5 < error < 0.2
        record = precision[place]
        assert record["precision"] == form.split("-")[0]
        assert record["kept"] == []
        # FP8 has nothing to choose.
        assert record["scheme"]["method"] == ("minmax" if form == "fp8" else "percentile")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "fp8 emulated" in page
    assert not [name for name in manifest(out)["selected"].values() if name.startswith("tensorrt")]
    verified = planish("verify", out, "--no-latency", cache=cache)
    assert verified.returncode == 0, verified.stdout


@pytest.mark.slow
@without_driver
def test_a_search_keeps_the_planted_layer(hostile: Path, cache: Path, texts: Path, tmp_path: Path) -> None:
    """One file for both targets, whose numbers ONNX Runtime finds good; neither can run it here."""
    out = tmp_path / "out"
    asked = ("targets=[onnxruntime-cpu, tensorrt, tensorrt-rtx]", "precisions=[fp32, int8]")
    done = export(hostile, out, cache, *asked, options=["--data", texts])
    assert done.returncode == 0, done.stderr
    by_id = {entry["id"]: entry for entry in manifest(out)["variants"]}
    place = "onnx/model_int8_tensorrt_kept.onnx"
    for target in ("tensorrt", "tensorrt-rtx"):
        assert by_id[f"{target}-{SMOOTH}"]["status"] == "failed"
        entry = by_id[f"{target}-{SMOOTH}-kept"]
        assert entry["files"] == [place]
        assert entry["status"] == "skipped"
        assert "no NVIDIA driver" in entry["reason"]
        assert entry["gates"]["quality"]["verdict"] == "passed"
        assert entry["executed"] is None
    onnx.checker.check_model(str(out / place), full_check=True)
    record = json.loads((out / "evidence" / "precision.json").read_text(encoding="utf-8"))[place]
    kept = {entry["node"] for entry in record["kept"] if entry["rule"] == "sensitivity"}
    assert kept == set(record["search"]["kept"])
    assert "layer.0.attention.output.dense/MatMul" in " ".join(kept)
    assert len(kept) < 4
    verified = planish("verify", out, "--no-latency", cache=cache)
    assert verified.returncode == 0, verified.stdout


@pytest.mark.slow
@without_driver
def test_numbers_that_are_bad_fail_the_variant_and_nothing_else(
    hostile: Path, cache: Path, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = (*NVIDIA, "calibration.search=false", "forms=all")
    done = export(hostile, out, cache, *asked, options=["--data", texts])
    assert done.returncode == 0, done.stderr
    by_id = {entry["id"]: entry for entry in manifest(out)["variants"]}
    assert by_id["tensorrt-int8-static"]["status"] == "failed"
    assert "agreement with the original" in by_id["tensorrt-int8-static"]["reason"]
    assert by_id["onnxruntime-cpu-fp32"]["status"] == "passed"


@pytest.mark.slow
@without_driver
def test_operators_too_old_for_fp8_stop_nothing(
    model_folder: Folders, cache: Path, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = ("targets=[onnxruntime-cpu, tensorrt]", "precisions=[fp32, fp8]", "export.opset=18")
    done = export(model_folder("bert"), out, cache, *asked, options=["--data", texts])
    assert done.returncode == 0, done.stderr
    by_id = {entry["id"]: entry for entry in manifest(out)["variants"]}
    assert by_id["tensorrt-fp8"]["status"] == "skipped"
    assert by_id["tensorrt-fp8"]["files"] == []
    assert not (out / "onnx" / "model_fp8.onnx").exists()
    evidence = json.loads((out / "evidence" / "quality.json").read_text(encoding="utf-8"))["variants"]["tensorrt-fp8"]
    assert "older than FP8" in evidence["reason"]


@pytest.mark.slow
@without_driver
def test_calibration_data_that_is_not_there(model_folder: Folders, cache: Path, tmp_path: Path) -> None:
    asked = (*NVIDIA, f"calibration.data={tmp_path / 'nowhere.jsonl'}")
    done = export(model_folder("bert"), tmp_path / "out", cache, *asked)
    assert done.returncode == 2
    assert "nowhere.jsonl" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@without_driver
def test_engines_for_gpus_that_are_not_here_are_built_ahead(model_folder: Folders, cache: Path, tmp_path: Path) -> None:
    """By the real TensorRT for RTX; their numbers are looked at in the graphs that they are built from."""
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path / "out"
    asked = (
        "targets=[onnxruntime-cpu, tensorrt-rtx]",
        "precisions=[fp32, fp16]",
        'engine.gpus=["8.9", "12.0"]',
        "latency.points=[1x8, 4x16]",
        "latency.baselines=[]",
        "keep=selected",
    )
    done = export(model_folder("bert"), out, cache, *asked)
    assert done.returncode == 0, done.stderr
    by_id = {entry["id"]: entry for entry in manifest(out)["variants"]}
    for name in ("tensorrt-rtx-fp32", "tensorrt-rtx-fp16"):
        entry = by_id[name]
        plan, sheet = (f"variants/{name}/{file}" for file in ("model.plan", "fingerprint.json"))
        assert entry["files"] == [plan, sheet]
        assert entry["status"] == "skipped"
        assert "no NVIDIA driver on this machine" in entry["reason"]
        assert "Its engine is in the bundle" in entry["reason"]
        assert entry["gates"]["parity"]["verdict"] == "passed"
        built = json.loads((out / sheet).read_text(encoding="utf-8"))
        assert built["sha256"] == file_digest(out / plan)
        assert built["fingerprint"]["gpus"] == ["8.9", "12.0"]
        (profile,) = built["fingerprint"]["profiles"]
        assert [shapes[1] for shapes in profile.values()] == [[4, 16]] * 3
    found = planish("engine", out, "--check", "--gpu", "8.9", "--json", "--quiet", cache=cache)
    assert found.returncode == 0, found.stdout + found.stderr
    # Of what was built ahead the graph is taken, where it is in the bundle: that of FP32 alone was selected.
    assert [one["variant"] for one in json.loads(found.stdout)["engines"]] == ["tensorrt-rtx-fp32"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"engine": {"gpus": ["9.0"]}}, "does not build for a GPU: engine.gpus: 9.0. It builds for 7.5"),
        ({"engine": {"gpus": ["8.9"]}, "targets": ["tensorrt"]}, "no target builds for them"),
        ({"engine": {"gpus": ["8.9", "8.9"]}}, "listed twice"),
        ({"engine": {"gpus": ["8.9", "sm_89"]}}, "listed twice"),
        ({"engine": {"gpus": [89]}}, "not a compute capability: 89. Write them as"),
    ],
)
def test_gpus_that_nothing_would_be_built_for_are_refused_before_any_work(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=re.escape(told)):
        refuse_unoffered(Recipe(**{"source": "a", "targets": ["tensorrt-rtx"], **changes}))


def test_gpus_may_be_written_in_other_ways() -> None:
    assert Recipe(source="a", engine={"gpus": ["SM120", 8.9]}).engine.gpus == ("12.0", "8.9")


def test_gpus_are_refused_where_what_builds_for_them_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "installed_version", lambda *names: None)
    asked = Recipe(source="a", targets=["tensorrt-rtx"], engine={"gpus": ["8.9"]})
    with pytest.raises(EnvironmentLackError, match=re.escape("engine.gpus: 8.9. pip install 'planish[rtx]'")):
        refuse_unoffered(asked)


def test_an_engine_for_other_gpus_than_this_machines_is_built_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU is pretended."""
    monkeypatch.setattr(TensorRtRtx, "missing", lambda self: [])
    monkeypatch.setattr(tensorrt, "gpu", lambda: {"devices": [{"compute_capability": "8.9"}]})
    for gpus, skipped in ((["12.0"], True), (["8.9", "12.0"], False), ([], False)):
        recipe = Recipe(source="a", targets=["tensorrt-rtx"], precisions=["fp16"], engine={"gpus": gpus})
        (found,) = candidates(recipe, traceable=True)
        assert (bool(found.skip), found.ahead) == (skipped, skipped)
