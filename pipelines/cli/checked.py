"""What `planish verify` and `planish bench` print for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.baselines import label
from pipelines.cli.screens import Screen
from pipelines.report.formats import milliseconds, ratio, short
from pipelines.report.variant import geometric_mean
from pipelines.verification.latency_result import spoils

_LONGEST_REASON = 300
Entries = Mapping[str, Mapping[str, Any]]


def show_variants(variants: Entries) -> None:
    """Every variant that was looked at with its verdict; the skipped ones by reason."""
    screen = Screen()
    judged = {name: entry for name, entry in variants.items() if entry["status"] != "skipped"}
    screen.table(None, [(name, entry["status"], _told(entry)) for name, entry in judged.items()])
    reasons: dict[str, list[str]] = {}
    for name, entry in variants.items():
        if name not in judged:
            reasons.setdefault(str(entry["reason"]), []).append(name)
    for reason, names in reasons.items():
        screen.line(f"skipped  {', '.join(names)}: {short(reason, _LONGEST_REASON)}", "dim")
    screen.show()


def _told(entry: Mapping[str, Any]) -> str:
    """The reason, and that it does not count where the variant had not passed when the bundle was made."""
    before = f"it was {entry['before']} when the bundle was made" if "before" in entry else ""
    if before and entry["status"] == "failed":
        before += ", so it does not count"
    return "; ".join(part for part in (str(entry["reason"]), before) if part)


def show_latency(record: Mapping[str, Any]) -> None:
    """A table of a measurement: what speed-ups are over comes first, the rest the fastest first."""
    workers = {**record.get("baselines", {}), **record.get("variants", {})}
    screen = Screen()
    if not workers:
        screen.line("Nothing was timed.")
        for note in record.get("notes", []):
            screen.line(note, "dim")
        screen.show()
        return
    points, reference = record["points"], record["baseline"]
    timed = {name: timing["points"] for name, timing in workers.items() if not timing["error"]}
    ordered = sorted(timed, key=lambda name: (name != reference, -(_overall(timed[name], points) or 0.0), name))
    screen.heading(f"p50 in ms, and how many times faster than {label(reference)}")
    rows = [(_called(name), *(_cell(timed[name][point], name == reference) for point in points)) for name in ordered]
    screen.table(("", *points), rows, right=range(1, len(points) + 1))
    screen.line(
        "In brackets the median over the rounds, each variant against what it is compared with in the same round, and "
        "half its 95 % interval; on a busy machine that need not be the quotient of two p50s. The fastest overall is "
        "first.",
        "dim",
    )
    busy = record.get("busy_elsewhere")
    if spoils(busy):
        screen.line(f"Not to be relied on: other programs took {busy:.0%} of the processors meanwhile.", "inconclusive")
    for name, timing in workers.items():
        if timing["error"]:
            screen.line(f"not timed: {_called(name)}: {timing['error']}")
    for note in record["notes"]:
        screen.line(note, "dim")
    screen.show()


def _called(name: str) -> str:
    return label(name).removeprefix("the ")


def _cell(figures: Mapping[str, Any], is_reference: bool) -> str:
    """As ``1.93 (3.48× ±2%)``."""
    speedup, low, high = (figures.get(key) for key in ("speedup", "speedup_low", "speedup_high"))
    if speedup is None or is_reference:
        return milliseconds(figures["p50_ms"])
    half = "" if low is None or high is None else f" ±{(high - low) / 2 / speedup:.0%}"
    return f"{milliseconds(figures['p50_ms'])} ({ratio(speedup)}{half})"


def _overall(figures: Mapping[str, Any], points: Sequence[str]) -> float | None:
    return geometric_mean(figures[name]["speedup"] for name in points)
