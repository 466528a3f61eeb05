"""`make gpu-check` where there is no GPU: it says so, and what it wrote where there was one can be read again."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from safetensors.numpy import save_file

from exporter.artifact import Axis, InputContract, Signature, TensorSpec
from exporter.hardware import gpu
from exporter.targets.onnxruntime import OnnxRuntimeSession

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("gpu-*.json"))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))  # where Python looks when it runs the script
    return importlib.import_module("gpu_check")


@pytest.mark.skipif(gpu()["available"], reason="there is a GPU: it would run")
def test_without_a_gpu_it_is_skipped_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stdout == f"Skipped: {gpu()['reason']}\n"
    assert not (tmp_path / "out").exists()


def test_a_folder_without_wheels_is_an_error(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--wheels", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"there are no wheels in {tmp_path}" in done.stderr


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_table_is_of_the_figures_beside_it(path: Path, script: ModuleType) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    assert path.with_suffix(".md").read_text(encoding="utf-8") == script.table(found)
    assert found["ok"] is all(script.sound(model) for model in found["models"].values())


def test_what_failed_is_not_sound(script: ModuleType) -> None:
    model = next(iter(json.loads(RESULTS[-1].read_text(encoding="utf-8"))["models"].values()))
    model["together"] = {"a": {"verdict": "passed"}}
    assert script.sound(model)

    def changed(**values: Any) -> Mapping[str, Any]:
        return {**copy.deepcopy(model), **values}

    assert not script.sound(changed(failed={"a": "why"}))
    assert not script.sound(changed(error="why"))
    assert not script.sound(changed(parity={}))
    assert not script.sound(changed(parity={**model["parity"], "a": {"verdict": "failed"}}))
    assert not script.sound(changed(parity={**model["parity"], "a": {"error": "it crashed"}}))
    assert not script.sound(changed(together={"a": {"error": "it crashed"}}))
    assert not script.sound(changed(together={"a": {"verdict": "failed"}}))


def test_what_went_wrong_among_threads_is_told_by_variant(script: ModuleType) -> None:
    import gpu_table

    right = {"verdict": "passed", "rms": 0.0, "threads": 4, "runs": 1200, "came_and_went": 3}
    assert gpu_table.together({}) == []
    (line,) = gpu_table.together({"a": right, "a and b": right})
    assert "4 threads" in line
    assert "1200 runs of each of a, a and b" in line
    assert "while 6 other sessions" in line
    told = gpu_table.together(
        {"a": right, "b": {**right, "verdict": "failed", "rms": 0.25}, "c": {"error": "signal 11"}}
    )
    assert told == [
        "- from several threads: b: differs by 0.25 from a run alone",
        "- from several threads: c: signal 11",
    ]


def test_variants_of_each_two_targets_meet_in_one_process(script: ModuleType) -> None:
    made = ["onnxruntime-cuda-fp32", "onnxruntime-cuda-fp16", "inductor-cuda-fp16", "inductor-cuda-fp16-shaped"]
    assert script.pairs(made) == [("onnxruntime-cuda-fp16", "inductor-cuda-fp16")]
    assert script.pairs(["onnxruntime-cuda-fp16"]) == []


@pytest.fixture
def place(tmp_path: Path, script: ModuleType) -> Path:
    """What `prepare` leaves, of a model that says where a mask is; for processors."""
    body = "{ y = Cast<to = 1>(attention_mask) }"
    signature = "g (int64[batch, sequence] attention_mask) => (float[batch, sequence] y)"
    onnx.save(
        onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 20]> {signature} {body}'), tmp_path / "m.onnx"
    )
    axes = ("batch", "sequence")
    tensors = ((TensorSpec("attention_mask", "int64", axes),), (TensorSpec("y", "float32", axes),))
    plan = {
        "files": {"onnx-fp32": str(tmp_path / "m.onnx")},
        "signature": Signature(*tensors, (Axis("batch", 1, 64), Axis("sequence", 1, 512))).to_dict(),
        "contract": InputContract().to_dict(),
        "own": {"fp32": {"y": 1e-6}},
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    for label, shape in {**script.POINTS, "odd": script.ODD}.items():
        save_file({"attention_mask": np.ones(shape, np.int64)}, tmp_path / f"{label}.safetensors")
    return tmp_path


def test_sessions_of_two_runtimes_on_the_processor_give_in_threads_what_they_give_alone(
    script: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "RUNS_TOGETHER", 20)
    found = script.together(str(place), "onnxruntime-cpu-fp32", "openvino-cpu-fp32")
    assert (found["verdict"], found["rms"], found["runs"]) == ("passed", 0.0, 240)
    assert found["came_and_went"] > 0


@pytest.mark.parametrize("wrong", ["run", "open"])
def test_one_wrong_output_among_threads_or_in_a_session_opened_beside_them_is_seen(
    script: ModuleType, place: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    class Wrong(OnnxRuntimeSession):
        opened = runs = 0

        def __init__(self, *given: Any, **how: Any) -> None:
            super().__init__(*given, **how)
            Wrong.opened += 1
            self.late = Wrong.opened > 2

        def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
            Wrong.runs += 1
            spoilt = self.late if wrong == "open" else Wrong.runs == 7
            return {name: array + spoilt for name, array in super().run(inputs).items()}

    monkeypatch.setattr(script, "RUNS_TOGETHER", 20)
    monkeypatch.setattr("exporter.targets.onnxruntime.OnnxRuntimeSession", Wrong)
    found = script.together(str(place), "onnxruntime-cpu-fp32")
    assert (found["verdict"], found["rms"]) == ("failed", 1.0)


def test_a_step_that_fails_or_crashes_is_told(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "No such file or directory" in script.step("parity", str(tmp_path), "onnxruntime-cuda-fp32")["error"]
    crashing = tmp_path / "python"
    crashing.write_text("#!/bin/sh\nkill -SEGV $$\n", encoding="utf-8")
    crashing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crashing))
    assert script.step("environment")["error"].startswith("signal 11")
    crashing.write_text("#!/bin/sh\nexec sleep 60\n", encoding="utf-8")
    monkeypatch.setattr(script, "STEP_SECONDS", 0.2)
    assert script.step("environment")["error"] == "it took more than 0.2 s"
