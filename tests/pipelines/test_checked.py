"""What `planish verify` and `planish bench` print."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.cli.actions import untimed
from pipelines.cli.checked import show_latency, show_variants


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_skipped_variants_share_a_line_for_each_reason(capsys: pytest.CaptureFixture[str]) -> None:
    variants = {
        "a-fp32": {"status": "passed", "reason": "parity: good"},
        "b-fp32": {"status": "skipped", "reason": "no GPU"},
        "c-fp32": {"status": "skipped", "reason": "its files were not kept"},
        "d-fp32": {"status": "skipped", "reason": "no GPU"},
    }
    show_variants(variants)
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()] == [
        "a-fp32 passed parity: good",
        "skipped b-fp32, d-fp32: no GPU",
        "skipped c-fp32: its files were not kept",
    ]


def test_what_speed_ups_are_over_comes_first_and_then_the_fastest(capsys: pytest.CaptureFixture[str]) -> None:
    def worker(p50_ms: float, speedup: float | None, error: str | None = None) -> dict[str, Any]:
        points = {} if error else {"1x16": {"p50_ms": p50_ms, "speedup": speedup}}
        return {"error": error, "points": points}

    record = {
        "baseline": "eager",
        "points": ["1x16"],
        "baselines": {"compile": worker(3.0, 2.0), "eager": worker(6.0, 1.0)},
        "variants": {"slow": worker(4.0, 1.5), "quick": worker(2.0, 3.0), "broken": worker(0, None, "it crashed")},
        "notes": ["Only 3 rounds were measured"],
    }
    show_latency(record)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "p50 in ms, and speed-up over eager PyTorch",
        "1x16",
        "eager PyTorch 6.00 (1.00×)",
        "quick 2.00 (3.00×)",
        "torch.compile 3.00 (2.00×)",
        "slow 4.00 (1.50×)",
        "not timed: broken: it crashed",
        "Only 3 rounds were measured",
    ]


def test_nothing_was_timed(capsys: pytest.CaptureFixture[str]) -> None:
    show_latency({})
    assert capsys.readouterr().out == "Nothing was timed.\n"
    show_latency({"notes": ["Not measured at 1x4: the model takes lengths from 8 to 64"]})
    assert capsys.readouterr().out.endswith("Not measured at 1x4: the model takes lengths from 8 to 64\n")


@pytest.mark.parametrize(
    ("errors", "told"),
    [
        ({"eager": None, "quick": "it crashed"}, None),
        ({"eager": "it crashed", "quick": None}, "eager PyTorch (it crashed)"),
        ({}, "nothing was timed"),
    ],
)
def test_a_measurement_without_its_reference_is_a_failure(errors: dict[str, str | None], told: str | None) -> None:
    workers = {name: {"error": error, "points": {}} for name, error in errors.items()}
    record = {"baseline": "eager", "baselines": {}, "variants": workers} if workers else {}
    found = untimed(record, "bundles/x")
    assert (found is None) is (told is None)
    if found is not None and told is not None:
        assert told in str(found)
        assert found.exit_status == 1
