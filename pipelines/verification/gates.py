"""Gates: verdicts, their order, and the status that a variant gets from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import exp, log
from typing import Any

from exporter.errors import InternalError

VERDICTS = ("passed", "skipped", "inconclusive", "failed")
"""From best to worst."""


def worst_verdict(verdicts: Iterable[str]) -> str:
    """The worst of the verdicts; ``passed`` if there is none.

    Raises:
        InternalError: One of them is no verdict.
    """
    worst = 0
    for verdict in verdicts:
        if verdict not in VERDICTS:
            raise InternalError("not a verdict", verdict, f"Verdicts: {', '.join(VERDICTS)}")
        worst = max(worst, VERDICTS.index(verdict))
    return VERDICTS[worst]


def skipped(reason: str) -> dict[str, Any]:
    """The record of a gate that could not be applied."""
    return {"verdict": "skipped", "reason": reason}


def variant_status(gates: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """The status of a variant and its reason: the worst of parity and quality, and of latency where that gates.

    Args:
        gates: Records with ``verdict`` and ``reason`` by gate; one with ``"gates": False`` informs only. A variant that
            lacks the record of parity or of quality was not proven: that gate counts as skipped.
    """
    counted = {name: gates.get(name, skipped("not measured")) for name in ("parity", "quality")}
    counted |= {name: gate for name, gate in gates.items() if gate.get("gates", True)}
    status = worst_verdict(gate["verdict"] for gate in counted.values())
    if status == "passed":
        return status, "; ".join(f"{name}: {gate['reason']}" for name, gate in counted.items())
    return status, "; ".join(f"{name}: {gate['reason']}" for name, gate in counted.items() if gate["verdict"] == status)


def latency_gate(points: Mapping[str, Mapping[str, Any]], min_speedup: float | None) -> dict[str, Any]:
    """The latency gate, which exists only where the recipe sets ``latency.min_speedup``.

    It compares the geometric mean over the operating points of the speed-up over the baseline, and of the ends of its
    intervals, as the overall selection does: passed when the lower bound reaches the minimum, failed when the upper one
    does not, else inconclusive.

    Args:
        points: By operating point, with ``speedup``, ``speedup_low`` and ``speedup_high`` (ratios).
        min_speedup: The minimum, a ratio; ``None`` where latency only ranks.
    """
    if min_speedup is None:
        return skipped("latency ranks, and gates only where the recipe sets latency.min_speedup") | {"gates": False}
    if not points:
        return skipped("latency was not measured")
    if any(p["speedup"] is None for p in points.values()):
        return {"verdict": "inconclusive", "reason": "what it is compared with could not be timed"}
    figures = {
        key: _geometric_mean(p[key] for p in points.values()) for key in ("speedup_low", "speedup", "speedup_high")
    }
    verdict = "inconclusive"
    if figures["speedup_low"] >= min_speedup:
        verdict = "passed"
    elif figures["speedup_high"] < min_speedup:
        verdict = "failed"
    reason = (
        f"speed-up {figures['speedup']:.2f} ({figures['speedup_low']:.2f} to {figures['speedup_high']:.2f}) over "
        f"{len(points)} operating points, at least {min_speedup:g} wanted"
    )
    return {"verdict": verdict, "reason": reason, "min_speedup": min_speedup} | figures


def _geometric_mean(values: Iterable[float]) -> float:
    found = list(values)
    return exp(sum(log(value) for value in found) / len(found)) if min(found) > 0 else 0.0
