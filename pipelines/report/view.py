"""The report document as the page shows it: what may be missing is filled with nothing, variants come best first."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipelines import baselines
from pipelines.baselines import EAGER
from pipelines.report.compression import CompressionView
from pipelines.report.formats import count, dig, listing, mapping, number, shown, significant, words
from pipelines.report.variant import OVERALL, STATUSES, VariantView
from pipelines.verification.latency_result import spoils


@dataclass(frozen=True)
class TimedRow:
    """A row of the latency table: a variant or a baseline."""

    label: str
    figures: Mapping[str, Any]
    tone: str


@dataclass(frozen=True)
class Route:
    """What to ship at one operating point (or overall)."""

    name: str
    variant: VariantView | None
    id: str | None


class ReportView:
    """The whole document, read tolerantly."""

    def __init__(self, report: Mapping[str, Any]) -> None:
        self.data = report
        self.name = str(report.get("name") or "unnamed model")
        self.task = str(report.get("task") or "")
        self.selected = mapping(report, "verdict", "selected")
        items = [item for item in listing(report, "variants") if isinstance(item, Mapping)]
        self.variants = sorted((VariantView(item, self.selected) for item in items), key=lambda v: v.rank)
        self.baselines = {name: mapping(report, "baselines", name) for name in mapping(report, "baselines")}
        # What speed-ups are against: a baseline, or where the recipe wants none a variant.
        self.reference = str(dig(report, "latency", "baseline") or EAGER)

    def part(self, *keys: str) -> Mapping[str, Any]:
        """A mapping of the document, empty where missing."""
        return mapping(self.data, *keys)

    def items(self, *keys: str) -> list[Any]:
        """A list of the document, empty where missing."""
        return listing(self.data, *keys)

    @cached_property
    def points(self) -> list[str]:
        """The operating points, in the order in which they were asked for."""
        named = [str(name) for name in listing(self.data, "latency", "points")]
        measured = [name for variant in self.variants for name in variant.points]
        other = [str(name) for data in self.baselines.values() for name in mapping(data, "points")]
        return list(dict.fromkeys([*named, *measured, *other]))

    @cached_property
    def dropped_points(self) -> str:
        """The operating points that the model does not take, with the reasons, in a line; empty where it takes all."""
        dropped = "; ".join(str(reason) for reason in listing(self.data, "latency", "dropped_points"))
        return f"Not measured at {dropped}." if dropped else ""

    @cached_property
    def busy_share(self) -> float | None:
        """The share of the processors that other programs took during timing, where that spoils the figures."""
        share = number(dig(self.data, "environment", "busy_elsewhere"))
        return share if spoils(share) else None

    @property
    def busy_note(self) -> str:
        """Why no speed-up is to be relied on, in words; empty where they are."""
        if self.busy_share is None:
            return ""
        return f"other programs took {self.busy_share:.0%} of the processors while they were measured"

    @property
    def reference_label(self) -> str:
        """What speed-ups are against, in a sentence."""
        label = baselines.label(self.reference)
        return f"the compressed model in {label}" if self.compression and self.reference in baselines.PYTORCH else label

    @cached_property
    def compression(self) -> CompressionView | None:
        """What was done before the export; ``None`` where the recipe does not compress."""
        data = self.part("compression")
        return CompressionView(data, self.variants, self.selected.get(OVERALL)) if data else None

    @property
    def versus(self) -> str:
        """What speed-ups are against, as the heading of a column."""
        return f"vs. {baselines.short_label(self.reference)}"

    @cached_property
    def rivals(self) -> list[tuple[str, Mapping[str, Any]]]:
        """The baselines that have a speed-up of their own: all but the reference."""
        return [(baselines.label(name), data) for name, data in self.baselines.items() if name != self.reference]

    @cached_property
    def against_pytorch(self) -> bool:
        """Variants were compared with the best of several PyTorch baselines."""
        return any(v.speed_vs_best(name).value is not None for v in self.variants for name in v.points)

    @cached_property
    def timed(self) -> list[VariantView]:
        """Variants with a speed-up at one operating point at least."""
        return [v for v in self.variants if any(v.speed(name).value is not None for name in v.points)]

    @cached_property
    def tried(self) -> list[VariantView]:
        """Variants that were not skipped."""
        return [v for v in self.variants if v.status != "skipped"]

    @cached_property
    def skipped(self) -> list[tuple[str, list[VariantView]]]:
        """Skipped variants grouped by reason."""
        groups: dict[str, list[VariantView]] = {}
        for variant in self.variants:
            if variant.status == "skipped":
                groups.setdefault(variant.reason, []).append(variant)
        return list(groups.items())

    @property
    def ok(self) -> bool:
        lost = self.compression is not None and self.compression.failed
        return dig(self.data, "verdict", "ok") is True and not lost

    @cached_property
    def routes(self) -> list[Route]:
        """What to ship: overall first, then per operating point; empty when nothing was selected."""
        if not any(self.selected.values()):
            return []
        names = dict.fromkeys([OVERALL, *self.points, *map(str, self.selected)])
        by_id = {v.id: v for v in self.variants}
        chosen = {name: self.selected.get(name) for name in names}
        return [Route(name, by_id.get(str(id_)), str(id_) if id_ else None) for name, id_ in chosen.items()]

    @cached_property
    def winner(self) -> VariantView | None:
        """The variant selected overall."""
        return next((v for v in self.variants if v.overall_winner), None)

    @cached_property
    def sentence(self) -> str:
        """The verdict in a sentence; made here where the document has none."""
        given = dig(self.data, "verdict", "sentence")
        if self.compression is not None and (self.compression.failed or not given) and any(self.selected.values()):
            return self.compression.sentence()
        if given:
            return str(given)
        if self.ok and self.winner:
            return f"Ship {self.winner.id}"
        if self.routes:
            return "A variant that the recipe requires did not pass"
        if not self.variants:
            return "There is no variant"
        if all(v.status == "skipped" for v in self.variants):
            return "Every variant was skipped"
        return "No variant passed its gates"

    @cached_property
    def closest(self) -> VariantView | None:
        """Where nothing was selected: the variant that came closest to passing."""
        if self.routes or not self.tried:
            return None

        def distance(variant: VariantView) -> tuple[int, float, float]:
            share = variant.limit_share
            excess = max(1.0, share) if share is not None else math.inf
            return (STATUSES.index(variant.status), excess, -(variant.overall or 0.0))

        return min(self.tried, key=distance)

    @cached_property
    def latency_rows(self) -> list[tuple[str, list[TimedRow]]]:
        """Per operating point what was timed, the fastest first."""
        tables = []
        for name in self.points:
            rows = [
                TimedRow(baselines.label(baseline), mapping(data, "points", name), "baseline")
                for baseline, data in self.baselines.items()
            ]
            for variant in self.variants:
                tone = "chosen" if name in variant.selected_for else "plain"
                rows.append(TimedRow(variant.id, mapping(variant.points, name), tone))
            timed = [row for row in rows if number(row.figures.get("p50_ms")) is not None]
            if timed:
                tables.append((name, sorted(timed, key=lambda row: number(row.figures["p50_ms"]) or 0.0)))
        return tables

    @cached_property
    def device_rows(self) -> list[tuple[str, list[TimedRow]]]:
        """Per operating point what a GPU did when it was kept busy, the most runs a second first; empty without one."""
        timed: list[tuple[str, Mapping[str, Any], list[str] | None]] = [
            (baselines.label(name), data, None) for name, data in self.baselines.items()
        ]
        timed += [(variant.id, variant.data, variant.selected_for) for variant in self.variants]
        tables = []
        for name in self.points:
            rows = []
            for label, data, chosen in timed:
                figures = mapping(data, "device", "points", name)
                if number(figures.get("runs_per_s")) is None:
                    continue
                tone = "baseline" if chosen is None else "chosen" if name in chosen else "plain"
                rows.append(TimedRow(label, {**figures, "memory_bytes": dig(data, "device", "memory_bytes")}, tone))
            if rows:
                tables.append((name, sorted(rows, key=lambda row: -(number(row.figures["runs_per_s"]) or 0.0))))
        return tables

    @cached_property
    def device_reasons(self) -> list[str]:
        """Why sensors of a GPU could not be read."""
        told = [dig(data, "device", "reason") for data in (*self.baselines.values(), *(v.data for v in self.variants))]
        return list(dict.fromkeys(str(reason) for reason in told if reason))

    @cached_property
    def untimed(self) -> list[tuple[str, str]]:
        """Variants that ran but have no timing, with the reason."""
        reasons = {v.id: dig(v.data, "gates", "latency", "reason") for v in self.variants if v.status != "skipped"}
        timed = {v.id for v in self.variants if v.points}
        return [(id_, str(reason)) for id_, reason in reasons.items() if reason and id_ not in timed]

    @cached_property
    def judged(self) -> list[VariantView]:
        """Variants whose quality was measured, with labels or without."""
        return [v for v in self.variants if v.has_interval or listing(v.quality, "measures")]

    @cached_property
    def executed(self) -> list[tuple[str, list[str]]]:
        """What really ran (runtime, device, precision), with the variants it ran for."""
        groups: dict[str, list[str]] = {}
        for variant in self.variants:
            if variant.executed_text:
                groups.setdefault(variant.executed_text, []).append(variant.id)
        return list(groups.items())

    @cached_property
    def energy(self) -> str:
        """Why energy is missing, or how much each variant took; empty where nothing is said."""
        measured = [f"{v.id} {significant(v.energy_j)} J" for v in self.variants if v.energy_j is not None]
        if measured:
            return f"Energy: {', '.join(measured)}."
        reasons = dict.fromkeys(v.energy_reason for v in self.variants if v.energy_reason)
        return f"Energy was not measured: {'; '.join(reasons)}." if reasons else ""

    @property
    def contract_text(self) -> str:
        """What callers promise, in words."""
        contract = self.part("input_contract")
        parts = []
        if contract.get("attends"):
            parts.append(f"every row of {contract.get('mask') or 'the mask'} attends to at least one token")
        for name, ends in mapping(contract, "id_ranges").items():
            known = list(ends) if isinstance(ends, list | tuple) else []
            text = f"from {count(known[0])} to {count(known[1])}" if len(known) == 2 else shown(ends)
            parts.append(f"{name} {text}")
        rest = {k: v for k, v in contract.items() if k not in ("attends", "mask", "id_ranges") and v is not None}
        parts += [f"{words(key)} {shown(value)}" for key, value in rest.items()]
        return "; ".join(parts) or "none"

    @property
    def recipe_text(self) -> str:
        """The resolved recipe as indented JSON."""
        return json.dumps(self.part("recipe"), indent=2, ensure_ascii=False, default=str)

    @property
    def built_in_data(self) -> str:
        """What Planish's own data stood in for, as ``evaluation and calibration``; empty where for nothing."""
        return " and ".join(use for use, item in self.part("data").items() if "built-in" in str(dig(item, "origin")))
