"""Sentences follow from given figures."""

from __future__ import annotations

from typing import Any

import pytest

from exporter.errors import RequestError
from pipelines.compress.claims import parse_claims
from pipelines.compress.wording import percentage, speed_sentence, speed_sentences


def ratio(value: float, low: float, high: float) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high}


def test_zeros_that_are_worth_nothing() -> None:
    found = {"onnxruntime-cpu-fp32": ratio(0.99, 0.97, 1.02), "eager": ratio(1.01, 1.0, 1.03)}
    assert speed_sentence("90 % sparse", found) == (
        "90 % sparse, 0 % faster on every target measured here "
        "(onnxruntime-cpu-fp32 0.99× [0.97, 1.02], eager 1.01× [1.00, 1.03])."
    )


def test_a_target_counts_as_faster_from_its_low_end_on() -> None:
    found = {"a": ratio(1.5, 1.4, 1.6), "b": ratio(1.03, 1.02, 1.04), "c": ratio(1.02, 1.019, 1.03)}
    assert speed_sentence("S", found) == (
        "S, faster than the dense twin on a 1.50× [1.40, 1.60], b 1.03× [1.02, 1.04]; not on c 1.02× [1.02, 1.03]."
    )


def test_wide_intervals_show_nothing() -> None:
    assert "not shown to be faster on any target" in speed_sentence("S", {"a": ratio(1.1, 0.8, 1.4)})
    both = {"a": ratio(1.1, 0.8, 1.4), "b": ratio(2.0, 1.9, 2.1)}
    assert "faster than the dense twin on b" in speed_sentence("S", both)
    assert "; not shown to be faster on a" in speed_sentence("S", both)


def test_what_failed_is_named() -> None:
    assert speed_sentence("S", {"a": {"error": "it crashed"}}) == (
        "S, and no target could be timed; a was not timed: it crashed."
    )


def test_both_forms_have_a_sentence_and_a_busy_machine_has_one() -> None:
    ratios = {"a": {"found": ratio(1.0, 0.99, 1.01), "smaller": ratio(1.3, 1.2, 1.4)}}
    told = speed_sentences(0.9, {"ratios": ratios, "busy_elsewhere": 0.5})
    assert [line.partition(",")[0] for line in told[:2]] == ["90 % sparse", "Without its dead parts"]
    assert "50% of the processors" in told[2]
    assert len(speed_sentences(0.9, {"ratios": ratios, "busy_elsewhere": 0.01})) == 2
    assert speed_sentences(0.9, {"skipped_all": "no"}) == [
        "Whether it is faster than its dense twin was not measured: no."
    ]


def test_percentages_never_round_to_what_they_are_not() -> None:
    shares = (0.0, 1e-6, 0.5, 0.84249, 0.99999, 1.0)
    assert [percentage(s) for s in shares] == ["0 %", "less than 0.1 %", "50 %", "84.2 %", "99.9 %", "100 %"]


def test_claims() -> None:
    assert parse_claims(" sparsity=0.9, 2:4") == [("sparsity", 0.9), ("2:4", 1.0)]
    for wrong in ("", "sparsity", "sparsity=nan", "sparsity=90", "1:4", "2:4=1", "sparsity=0.9,"):
        with pytest.raises(RequestError):
            parse_claims(wrong)
