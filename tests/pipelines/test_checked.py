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


@pytest.mark.parametrize("busy", [0.02, 0.4])
def test_what_speed_ups_are_over_comes_first_and_then_the_fastest(
    busy: float, capsys: pytest.CaptureFixture[str]
) -> None:
    def worker(p50_ms: float, speedup: float | None, error: str | None = None) -> dict[str, Any]:
        points: dict[str, Any] = {}
        if speedup is not None:
            low, high = 0.98 * speedup, 1.04 * speedup
            points = {"1x16": {"p50_ms": p50_ms, "speedup": speedup, "speedup_low": low, "speedup_high": high}}
        return {"error": error, "points": points}

    record = {
        "baseline": "eager",
        "points": ["1x16"],
        "baselines": {"compile": worker(3.0, 2.0), "eager": worker(6.0, 1.0)},
        "variants": {"slow": worker(4.0, 1.5), "quick": worker(2.0, 3.0), "broken": worker(0, None, "it crashed")},
        "notes": ["Only 3 rounds were measured"],
        "busy_elsewhere": busy,
    }
    show_latency(record)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    table, notes = lines[:6], lines[6:]
    assert table == [
        "p50 in ms, and how many times faster than eager PyTorch",
        "1x16",
        "eager PyTorch 6.00",
        "quick 2.00 (3.00× ±3%)",
        "torch.compile 3.00 (2.00× ±3%)",
        "slow 4.00 (1.50× ±3%)",
    ]
    assert notes[0].startswith("In brackets the median over the rounds")
    disowned = ["Not to be relied on: other programs took 40% of the processors meanwhile."] if busy > 0.25 else []
    assert notes[-2 - len(disowned) :] == [
        *disowned,
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
