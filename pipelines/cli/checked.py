"""What `planish verify` and `planish bench` print for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.baselines import label
from pipelines.cli.screens import Screen
from pipelines.report.formats import milliseconds, ratio

Entries = Mapping[str, Mapping[str, Any]]


def show_variants(variants: Entries) -> None:
    """Every variant that was looked at with its verdict; the skipped ones by reason."""
    screen = Screen()
    judged = {name: entry for name, entry in variants.items() if entry["status"] != "skipped"}
    screen.table(None, [(name, entry["status"], entry["reason"]) for name, entry in judged.items()])
    reasons: dict[str, list[str]] = {}
    for name, entry in variants.items():
        if name not in judged:
            reasons.setdefault(str(entry["reason"]), []).append(name)
    for reason, names in reasons.items():
        screen.line(f"skipped  {', '.join(names)}: {reason}", "dim")
    screen.show()


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
    ordered = sorted(timed, key=lambda name: (name != reference, [timed[name][p]["p50_ms"] for p in points]))
    screen.heading(f"p50 in ms, and speed-up over {label(reference)}")
    rows = [(_called(name), *(_cell(timed[name][point]) for point in points)) for name in ordered]
    screen.table(("", *points), rows, right=range(1, len(points) + 1))
    for name, timing in workers.items():
        if timing["error"]:
            screen.line(f"not timed: {_called(name)}: {timing['error']}")
    for note in record["notes"]:
        screen.line(note, "dim")
    screen.show()


def _called(name: str) -> str:
    return label(name).removeprefix("the ")


def _cell(figures: Mapping[str, Any]) -> str:
    speedup = figures["speedup"]
    return milliseconds(figures["p50_ms"]) + ("" if speedup is None else f" ({ratio(speedup)})")
