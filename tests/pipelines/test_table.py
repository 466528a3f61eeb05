"""The terminal table: it fits, it says the same as the report, and no text of the model becomes markup."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from pipelines.table import render_table
from tests.pipelines.report_examples import EXAMPLES, full, hostile, nothing_selected


def printed(report: dict[str, Any], width: int, encoding: str = "utf-8") -> str:
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding=encoding, errors="strict", newline="\n")
    render_table(report, Console(file=stream, width=width, force_terminal=False, color_system=None))
    stream.flush()
    return buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_every_document_fits_every_width(name: str, width: int) -> None:
    text = printed(EXAMPLES[name](), width)
    assert max(len(line) for line in text.splitlines()) <= width


def row(text: str, start: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.startswith(start))


def test_figures_of_a_wide_table() -> None:
    text = printed(full(), 140)
    heading = "Variant 1x16 1x32 1x128 8x128 Overall RMS error Quality Size Status"
    assert " ".join(row(text, "Variant")) == heading
    best = "onnxruntime-cpu-fp32 2.37×* 1.86×* 1.12× 1.03× 1.50×* 6.2×10⁻⁷ 0.00 90.9 MB passed"
    assert " ".join(row(text, "onnxruntime-cpu-fp32 ")) == best
    assert row(text, "inductor-cpu-fp32 ")[3:5] == ["1.24×*", "1.22×*"]
    assert row(text, "torch.compile") == ["torch.compile", "1.42×", "1.31×", "1.12×", "1.09×", "baseline"]


def test_speed_ups_of_a_busy_machine_are_disowned() -> None:
    told = "They cannot be relied on: other programs took 38% of the processors while they were measured."
    assert told not in printed(full() | {"environment": {"busy_elsewhere": 0.2}}, 200)
    assert told in printed(full() | {"environment": {"busy_elsewhere": 0.38}}, 200).splitlines()


def test_a_narrow_table_keeps_the_points_and_the_status() -> None:
    heading = row(printed(full(), 80), "Variant")
    assert heading == ["Variant", "1x16", "1x32", "1x128", "8x128", "Overall", "Status"]


def test_reasons_and_commands_are_told() -> None:
    text = printed(full(), 200)
    assert "inconclusive  openvino-cpu-bf16: quality: the interval reaches beyond" in text
    assert "skipped  onnxruntime-cuda-fp16, onnxruntime-cuda-fp32: no NVIDIA driver" in text
    assert "pip install 'planish[gpu]'" in text
    assert "Built-in data were used for" in text


def test_points_that_the_model_does_not_take_are_told_also_where_nothing_was_timed() -> None:
    report = full() | {"latency": {"dropped_points": ["1x4: the model takes lengths from 8 to 64", "17x16: too many"]}}
    told = "Not measured at 1x4: the model takes lengths from 8 to 64; 17x16: too many."
    assert told in printed(report, 200).splitlines()
    assert "Not measured at" not in printed(full(), 200)


def test_the_verdict_is_the_last_word() -> None:
    assert printed(full(), 200).splitlines()[-1].startswith("Ship onnxruntime-cpu-fp32: 2.37x faster")
    last = printed(nothing_selected(), 200).splitlines()[-2:]
    assert last == ["Do not ship: No variant passed its gates", "Closest: openvino-cpu-bf16 (inconclusive)"]


def test_an_ascii_terminal_gets_ascii() -> None:
    text = printed(full(), 140, "ascii")
    assert "2.37x*" in text
    assert "6.2e-7" in text
    assert "-0.35" in text


def test_texts_are_no_markup_and_no_control_sequences() -> None:
    report = hostile()
    report["verdict"]["sentence"] = "Ship [bold red]x[/] \x1b[2J\x07 done"
    report["variants"][-1]["reason"] = "[link=http://evil.example]see[/link]"
    text = printed(report, 200)
    assert "Ship [bold red]x[/]  [2J  done" in text
    assert "\x1b" not in text
    assert "[link=http://evil.example]see[/link]" in text
