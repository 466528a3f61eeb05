"""`make gpu-check` where there is no GPU: it says so, and what it wrote where there was one can be read again."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from exporter.hardware import gpu

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("gpu-*.json"))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    import importlib.util

    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    right = {"verdict": "passed", "rms": 0.0, "runs": 1200}
    assert script._together({}) == []
    (line,) = script._together({"a": right, "b": right})
    assert "1200 runs of each variant" in line
    told = script._together({"a": right, "b": {**right, "verdict": "failed", "rms": 0.25}, "c": {"error": "signal 11"}})
    assert told == [
        "- from several threads: b: differs by 0.25 from a run alone",
        "- from several threads: c: signal 11",
    ]


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
