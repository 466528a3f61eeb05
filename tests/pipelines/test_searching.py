"""Where an int8 or int4 form fails its quality gate: what a search keeps of it, in the main job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.pipelines.jobs import export, manifest, planish
from tests.pipelines.planted import plant_outliers

pytestmark = pytest.mark.slow
DYNAMIC, STATIC = "onnxruntime-cpu-int8-dynamic", "openvino-cpu-int8-static-smooth"
INT4 = "onnxruntime-cpu-int4"
BOTH = ("targets=[onnxruntime-cpu, openvino-cpu]", "precisions=[fp32, int8]")


def test_a_search_keeps_the_planted_layer_and_the_report_shows_why(
    hostile: Path, cache: Path, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = export(hostile, out, cache, *BOTH, "require=[onnxruntime-cpu-int8-dynamic-kept]", options=["--data", texts])
    assert done.returncode == 0, done.stderr
    by_id = {entry["id"]: entry for entry in manifest(out)["variants"]}
    precision = json.loads((out / "evidence" / "precision.json").read_text(encoding="utf-8"))
    page = (out / "report.html").read_text(encoding="utf-8")
    for plain in (DYNAMIC, STATIC):
        assert by_id[plain]["status"] == "failed"
        entry = by_id[f"{plain}-kept"]
        assert entry["status"] == "passed", entry["reason"]
        assert entry["executed"]["precision"] == "int8"
        found = precision[f"{plain}-kept"]["search"]
        assert [name.partition("layer.0.")[2] for name in found["kept"]] == ["attention.output.dense/MatMul"]
        assert all(name in page for name in found["kept"])
        rules = {kept["node"]: kept["rule"] for kept in precision[f"{plain}-kept"]["kept"]}
        assert {name for name, rule in rules.items() if rule == "sensitivity"} == set(found["kept"])


def test_a_search_for_compiled_code_keeps_the_planted_layer(
    hostile: Path, cache: Path, texts: Path, tmp_path: Path
) -> None:
    out, plain = tmp_path / "out", "inductor-cpu-int8-static-smooth"
    asked = ("targets=[inductor-cpu]", "precisions=[int8]", f"require=[{plain}-kept]")
    done = export(hostile, out, cache, *asked, options=["--data", texts])
    assert done.returncode == 0, done.stderr
    by_id = {entry["id"]: entry for entry in manifest(out)["variants"]}
    assert by_id[plain]["status"] == "failed"
    entry = by_id[f"{plain}-kept"]
    assert entry["status"] == "passed", entry["reason"]
    assert entry["files"][0] == f"variants/{plain}-kept/model.pt2"
    assert by_id[plain]["executed"]["integer_kernels"] == {"qlinear": 12}
    assert entry["executed"]["integer_kernels"] == {"qlinear": 11}
    assert entry["points"]
    record = json.loads((out / "evidence" / "precision.json").read_text(encoding="utf-8"))[f"{plain}-kept"]
    assert record["search"]["kept"] == ["linear_3"]  # behind query, key and value of the first layer
    assert [(kept["node"], kept["rule"]) for kept in record["kept"]] == [("linear_3", "sensitivity")]
    assert record["quantized"] == 11
    assert record["smoothing"]["inserted"] > 0  # and the integer products are found behind what was inserted
    verified = planish("verify", out, "--no-latency", "--trust", cache=cache)
    assert verified.returncode == 0, verified.stdout


def test_a_search_for_int4_keeps_the_planted_layer(hostile: Path, cache: Path, texts: Path, tmp_path: Path) -> None:
    """Weights ten thousand times smaller than those in their block become zeros."""
    out, kept = tmp_path / "out", f"{INT4}-kept"
    done = export(hostile, out, cache, "precisions=[fp32, int4]", f"require=[{kept}]", options=["--data", texts])
    assert done.returncode == 0, done.stderr
    by_id = {entry["id"]: entry for entry in manifest(out)["variants"]}
    assert by_id[INT4]["status"] == "failed"
    assert by_id[kept]["files"] == [f"variants/{kept}/model_int4.onnx"]
    assert by_id[kept]["executed"]["integer_weights"] == {"MatMulNBits, 4 bits": 11}
    record = json.loads((out / "evidence" / "precision.json").read_text(encoding="utf-8"))[kept]
    found = [(entry["node"].partition("layer.0.")[2], entry["rule"]) for entry in record["kept"]]
    assert found == [("attention.output.dense/MatMul", "sensitivity")]


def test_without_a_search_nothing_more_is_made(hostile: Path, cache: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = ("precisions=[fp32, int8]", "calibration.search=false")
    done = export(hostile, out, cache, *asked, options=["--data", texts])
    assert done.returncode == 0, done.stderr
    status = {entry["id"]: entry["status"] for entry in manifest(out)["variants"]}
    assert status[DYNAMIC] == "failed"
    assert not [name for name in status if name.endswith("-kept")]


def test_a_real_classifier_made_hostile_passes_with_few_layers_kept(shared: Path, cache: Path, tmp_path: Path) -> None:
    """Two of six layers planted: int8 loses more than five points; at most a fifth of its layers may be kept."""
    hostile = plant_outliers(shared / "models" / "minilm-sst2", tmp_path / "hostile", (1, 3), 4, 2000.0, scale=1.0)
    out = tmp_path / "out"
    data = ["--data", shared / "data" / "sst2" / "dev.tsv", "--column", "text=0", "--column", "label=1"]
    asked = ("precisions=[fp32, int8]", "quality.max_drop=0.5")
    done = export(hostile, out, cache, *asked, options=data)
    assert done.returncode == 0, done.stderr
    gates = json.loads((out / "evidence" / "quality.json").read_text(encoding="utf-8"))
    assert gates["variants"][DYNAMIC]["difference"] <= -5
    assert gates["variants"][f"{DYNAMIC}-kept"]["verdict"] == "passed"
    found = json.loads((out / "evidence" / "precision.json").read_text(encoding="utf-8"))[f"{DYNAMIC}-kept"]["search"]
    planted = {f"bert.encoder.layer.{layer}.attention.output.dense/MatMul" for layer in (1, 3)}
    assert planted <= set(found["kept"])
    assert len(found["kept"]) <= 0.2 * len(found["layers"])
