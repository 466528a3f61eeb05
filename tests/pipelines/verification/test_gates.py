from __future__ import annotations

import itertools

import pytest

from exporter.errors import InternalError
from pipelines.verification.gates import VERDICTS, latency_gate, skipped, variant_status, worst_verdict


def gate(verdict: str) -> dict[str, str]:
    return {"verdict": verdict, "reason": f"because {verdict}"}


def test_the_order_is_failed_inconclusive_skipped_passed() -> None:
    order = ["failed", "inconclusive", "skipped", "passed"]
    for one, two in itertools.product(order, repeat=2):
        assert worst_verdict([one, two]) == order[min(order.index(one), order.index(two))]
    assert worst_verdict([]) == "passed"
    with pytest.raises(InternalError, match="not a verdict"):
        worst_verdict(["fine"])


@pytest.mark.parametrize(("parity", "quality"), itertools.product(VERDICTS, repeat=2))
def test_status_is_the_worst_of_parity_and_quality(parity: str, quality: str) -> None:
    status, reason = variant_status({"parity": gate(parity), "quality": gate(quality)})
    assert status == worst_verdict([parity, quality])
    assert ("parity: because" in reason) == (parity == status)
    assert ("quality: because" in reason) == (quality == status)


def test_what_was_not_measured_is_not_passed() -> None:
    assert variant_status({"parity": gate("passed")}) == ("skipped", "quality: not measured")
    assert variant_status({"parity": gate("passed"), "quality": skipped("no data")})[0] == "skipped"


POINTS = {
    "1x16": {"speedup": 2.0, "speedup_low": 1.8, "speedup_high": 2.2},
    "1x32": {"speedup": 0.5, "speedup_low": 0.45, "speedup_high": 0.6},
}


def test_latency_ranks_and_gates_only_where_asked() -> None:
    passed = {"parity": gate("passed"), "quality": gate("passed")}
    slow = latency_gate({"1x16": {"speedup": 0.1, "speedup_low": 0.1, "speedup_high": 0.1}}, None)
    assert slow["verdict"] == "skipped"
    assert variant_status({**passed, "latency": slow})[0] == "passed"
    asked = latency_gate({"1x16": {"speedup": 0.1, "speedup_low": 0.1, "speedup_high": 0.1}}, 1.0)
    assert variant_status({**passed, "latency": asked})[0] == "failed"
    assert variant_status({**passed, "latency": latency_gate({}, 1.0)})[0] == "skipped"


@pytest.mark.parametrize(
    ("minimum", "verdict"),
    [(0.8, "passed"), (0.9, "passed"), (1.0, "inconclusive"), (1.1, "inconclusive"), (1.2, "failed")],
)
def test_the_latency_gate_looks_at_the_interval_of_the_geometric_mean(minimum: float, verdict: str) -> None:
    record = latency_gate(POINTS, minimum)
    assert record["verdict"] == verdict
    assert record["speedup"] == pytest.approx(1.0)
    assert record["speedup_low"] == pytest.approx((1.8 * 0.45) ** 0.5)
