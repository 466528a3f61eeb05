"""Compression in the terminal: the second table of a run and of ``planish inspect``, and the document for machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.bundle import write_bundle
from pipelines.cli.inspecting import inspect_subject
from tests.pipelines.compression_examples import EXAMPLES, INT8, compressed, lost_too_much, untimed, without_labels
from tests.pipelines.report_examples import full
from tests.pipelines.test_report_compression import LOST, SHIPPED
from tests.pipelines.test_sentence import written
from tests.pipelines.test_table import printed


def second(report: dict[str, Any], width: int) -> list[str]:
    """The lines from the table of models on."""
    lines = [" ".join(line.split()) for line in printed(report, width).splitlines()]
    return lines[next(i for i, line in enumerate(lines) if line.startswith("Model")) :]


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("width", [40, 64, 80, 96, 120, 200])
def test_every_document_fits_every_width(name: str, width: int) -> None:
    text = printed(EXAMPLES[name](), width)
    assert max(len(line) for line in text.splitlines()) <= width


def test_every_model_is_told_beside_the_teacher() -> None:
    lines = second(compressed(), 200)
    assert lines[0] == "Model Macro F1 vs. teacher Size 1x128 8x128"
    assert lines[2] == "1-finetune fine-tuned 0.9142 teacher 438 MB 1.46× 1.39×"
    assert lines[4] == "3-distil distilled into 6 layers 0.9100 −0.42 (−1.27 to +0.43) 213 MB (49 %) 2.52× 2.24×"
    assert lines[7] == f"{INT8} 0.9062 −0.80 (−1.70 to +0.10) 35.3 MB (8.1 %) 7.45× 5.79×"
    assert "speeds are times the teacher in eager PyTorch, models timed on onnxruntime-cpu-fp32." in lines[9]
    assert lines[10].startswith("Compression kept its budget: −0.68 points of macro F1 (−1.53 to +0.17); 2 may be lost")
    assert lines[-1] == SHIPPED


def test_narrow_terminals_keep_quality_and_size() -> None:
    assert second(compressed(), 80)[0] == "Model Macro F1 vs. teacher Size 1x128"
    assert second(compressed(), 50)[0] == "Model vs. teacher Size"


def test_there_is_no_second_table_without_compression() -> None:
    assert "teacher" not in printed(full(), 200)


def test_a_model_that_lost_too_much_has_the_last_word() -> None:
    lines = second(lost_too_much(), 200)
    assert lines[-2].startswith(f"C{LOST}")
    assert lines[-1].startswith(f"Do not ship: c{LOST}")


def test_without_labels_and_without_timing() -> None:
    lines = second(without_labels(), 200)
    assert lines[0] == "Model Agreement Size 1x128 8x128"
    assert lines[3].startswith("2-prune 12840 of 30522 tokens kept 0.9900 384 MB")
    assert second(untimed(), 200)[0] == "Model Macro F1 vs. teacher Size"
    assert not any("speeds are" in line for line in second(untimed(), 200))


def test_speeds_of_a_busy_machine_are_disowned() -> None:
    report = compressed()
    report["compression"]["busy_elsewhere"] = 0.42
    told = "These speeds cannot be relied on: other programs took 42% of the processors meanwhile."
    assert told in second(report, 200)
    assert told not in second(compressed(), 200)


def test_an_ascii_terminal_gets_ascii() -> None:
    text = printed(compressed(), 200, "ascii")
    assert "-0.80 (-1.70 to +0.10)" in text
    assert "7.45x" in text


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    document = {key: value for key, value in compressed()["compression"].items() if key != "steps"}
    manifest = written({"1x16": {"p50_ms": 1.0, "speedup": 2.5}})
    document["selected"]["onnxruntime-cpu-fp32"]["bytes"] = 139_700_000
    manifest = manifest.model_copy(update={"compression": document})
    return write_bundle({"onnx/model.onnx": b"graph"}, manifest, tmp_path / "bundle").path


def test_inspect_shows_the_models(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert inspect_subject(str(bundle), as_json=False) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "Compression" in lines
    assert "3-distil distilled into 6 layers 0.9100 −0.42 (−1.27 to +0.43) 213 MB (49 %) 2.52× 2.24×" in lines
    assert any(line.startswith("Compression kept its budget") for line in lines)
    verdict = next(line for line in lines if line.startswith("Verdict"))
    assert "Ship onnxruntime-cpu-fp32: 3.13× to 5.10× the teacher in eager PyTorch" in verdict


def test_inspect_has_the_document_for_machines(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect_subject(str(bundle), as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["compression"]["teacher"] == "1-finetune"
    assert found["verdict"]["ok"] is True


def test_inspect_without_a_report_knows_that_too_much_was_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = lost_too_much()["compression"]
    manifest = written({}).model_copy(update={"compression": document})
    path = write_bundle({"onnx/model.onnx": b"graph"}, manifest, tmp_path / "lost").path
    inspect_subject(str(path), as_json=True)
    verdict = json.loads(capsys.readouterr().out)["verdict"]
    assert verdict["ok"] is False
    assert verdict["sentence"].startswith(f"Do not ship: c{LOST}")
