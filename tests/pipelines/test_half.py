"""Half forms in the main job: what stays in FP32 is measured on calibration data, and the evidence says on which."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from exporter.artifact import Artifact, Axis, InputContract, Signature, TensorSpec
from exporter.errors import RequestError
from exporter.sources import Source
from pipelines.stages.ranges import measure
from tests.pipelines.jobs import export

AXES = (Axis("batch", 1, 16),)
SIGNATURE = Signature((TensorSpec("x", "float32", ("batch", 4)),), (TensorSpec("y", "float32", ("batch", 4)),), AXES)


def graph(tmp_path: Path, body: str) -> Artifact:
    model = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 20]> g (float[batch, 4] x) => (float[batch, 4] y) {{ {body} }}'
    )
    onnx.save(model, tmp_path / "model.onnx")
    return Artifact(tmp_path / "model.onnx", "onnx", SIGNATURE, InputContract())


def measured(artifact: Artifact, tmp_path: Path, data: Path | None, samples: int = 256) -> dict[str, Any]:
    folder = tmp_path / "out"
    folder.mkdir()
    source = Source("factory", "a:b", None, "b", "0" * 64).to_dict()
    return measure(
        {
            "artifact": artifact.to_dict(),
            "original": {"task": "custom", "source": source},
            "data": {"path": data and str(data), "columns": {}, "limit": None, "split": None, "seed": 0},
            "samples": samples,
            "seed": 0,
            "threads": 1,
            "folder": str(folder),
        }
    )


def test_without_data_generated_tensors_are_measured(tmp_path: Path) -> None:
    made = measured(graph(tmp_path, "h = Add(x, x) y = Relu(h)"), tmp_path, None)
    assert made["record"] == {"samples": 64, "batches": 8, "tensors": 3, "origin": "generated tensors", "notes": []}
    written = json.loads((tmp_path / "out" / made["path"]).read_text(encoding="utf-8"))
    assert written["ranges"]["h"]["low"] == 2 * written["ranges"]["x"]["low"]


def test_rows_that_are_asked_for_bound_those_that_are_measured(tmp_path: Path) -> None:
    assert measured(graph(tmp_path, "y = Relu(x)"), tmp_path, None, samples=5)["record"]["samples"] == 5


def test_data_that_cannot_be_opened_leave_the_operators_to_decide(tmp_path: Path) -> None:
    made = measured(graph(tmp_path, "y = Relu(x)"), tmp_path, tmp_path / "nowhere.npz")
    assert made["path"] is None
    assert "cannot be opened" in made["record"]["why"]
    assert "nowhere.npz" in made["record"]["why"]


def test_a_users_row_that_makes_nan_is_named_and_generated_ones_are_passed_over(tmp_path: Path) -> None:
    artifact = graph(tmp_path, "h = Log(x) y = Relu(h)")
    made = measured(artifact, tmp_path, None)  # half of standard normal numbers have no logarithm
    assert made["path"] is None
    assert "NaN or infinite" in made["record"]["why"]
    (tmp_path / "out").rmdir()
    rows = np.ones((6, 4), np.float32)
    rows[4] = -1
    np.savez(tmp_path / "rows.npz", x=rows)
    with pytest.raises(RequestError) as caught:
        measured(artifact, tmp_path, tmp_path / "rows.npz")
    assert str(caught.value.value) == "tensor 'h', calibration sample 4"


@pytest.mark.slow
def test_scores_beyond_fp16_are_found_in_the_main_job(cache: Path, tmp_path: Path) -> None:
    """PyTorch's own FP16 run of this model is NaN throughout."""
    out = tmp_path / "out"
    asked = ("targets=[onnxruntime-cpu, tensorrt-rtx]", "precisions=[fp32, fp16, bf16]", 'latency.points=["1"]')
    done = export("tests.pipelines.planted:loud_attention", out, cache, *asked)
    assert done.returncode == 0, done.stderr
    precision = json.loads((out / "evidence" / "precision.json").read_text(encoding="utf-8"))
    fp16, bf16 = precision["onnx/model_fp16.onnx"], precision["onnx/model_bf16.onnx"]
    assert fp16["measured"] == bf16["measured"]
    assert (fp16["measured"]["samples"], fp16["measured"]["origin"]) == (64, "generated tensors")
    assert [(entry["op"], entry["rule"]) for entry in fp16["kept"]] == [
        ("MatMul", "measured_range"),
        ("Mul", "measured_range"),
    ]
    assert all(entry["figures"]["largest_abs"] > 65504 for entry in fp16["kept"])
    assert "measured_range" not in {entry["rule"] for entry in bf16["kept"]}
    parity = json.loads((out / "evidence" / "parity.json").read_text(encoding="utf-8"))["tensorrt-rtx-fp16"]
    (output,) = parity["outputs"].values()
    assert (output["nan"], output["inf"]) == (0, 0)
    assert output["rms_relative"] < 2e-3
    assert "an eighth of the error of its bf16 run" in parity["floor_note"]
    assert parity["verdict"] == "passed", parity
    assert "Measured over 64 rows of generated tensors" in (out / "report.html").read_text(encoding="utf-8")
