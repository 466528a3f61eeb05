"""The report document as the page shows it: what may be missing is filled with nothing, variants come best first."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipelines.report.formats import count, dig, listing, mapping, number, point, shown, significant, words

STATUSES = ("passed", "inconclusive", "failed", "skipped")
"""Best first: the order in which variants are listed."""
OVERALL = "overall"


@dataclass(frozen=True)
class Speed:
    """A speed-up with its 95 % interval; any of the three may be unknown."""

    value: float | None = None
    low: float | None = None
    high: float | None = None

    @classmethod
    def read(cls, figures: Mapping[str, Any], key: str) -> Speed:
        return cls(number(figures.get(key)), number(figures.get(f"{key}_low")), number(figures.get(f"{key}_high")))

    @property
    def known(self) -> list[float]:
        return [v for v in (self.value, self.low, self.high) if v is not None]


def known_status(value: Any) -> str:
    """`value` where it is a status; anything else is inconclusive, which is the truth about it."""
    return value if value in STATUSES else "inconclusive"


class VariantView:
    """One variant of the document."""

    def __init__(self, data: Mapping[str, Any], selected: Mapping[str, Any]) -> None:
        self.data = data
        self.id = str(data.get("id") or "unnamed")
        self.status = known_status(data.get("status"))
        self.reason = str(data.get("reason") or "")
        self.bytes = number(data.get("bytes"))
        self.peak_rss_bytes = number(data.get("peak_rss_bytes"))
        self.energy_j = number(data.get("energy_j"))
        self.energy_reason = str(data.get("energy_reason") or "")
        self.executed = mapping(data, "executed")
        self.parity = mapping(data, "gates", "parity")
        self.quality = mapping(data, "gates", "quality")
        self.points = {str(k): v for k, v in mapping(data, "points").items() if isinstance(v, Mapping)}
        self.selected_for = [str(key) for key, chosen in selected.items() if chosen == self.id]

    @property
    def overall_winner(self) -> bool:
        return OVERALL in self.selected_for

    @property
    def route_label(self) -> str:
        """The operating points that this variant was selected for, as text."""
        return ", ".join(point(name) for name in self.selected_for)

    def speed(self, name: str) -> Speed:
        """Speed-up over eager PyTorch at the operating point `name`."""
        return Speed.read(self.points.get(name, {}), "speedup")

    def speed_vs_best(self, name: str) -> Speed:
        """Speed-up over the strongest PyTorch baseline at the operating point `name`."""
        return Speed.read(self.points.get(name, {}), "speedup_vs_best_pytorch")

    @cached_property
    def overall(self) -> float | None:
        """Geometric mean of the speed-ups over the measured operating points."""
        return geometric_mean(self.speed(name).value for name in self.points)

    @cached_property
    def overall_low(self) -> float | None:
        """Geometric mean of the intervals' lower ends: the figure that selection ranks by."""
        return geometric_mean(self.speed(name).low for name in self.points)

    @cached_property
    def errors(self) -> dict[str, float]:
        """RMS relative error per output."""
        outputs = mapping(self.parity, "outputs")
        errors = {str(name): number(dig(figures, "rms_relative")) for name, figures in outputs.items()}
        return {name: error for name, error in errors.items() if error is not None}

    @property
    def worst_error(self) -> float | None:
        return max(self.errors.values(), default=None)

    @property
    def decisive_error(self) -> float | None:
        """The error at the case and output that came nearest to its limit; floor and limit are that case's.

        Every case and output has its own limit, so this need not be the largest error. Without limits it is.
        """
        share, limit = number(self.parity.get("ratio")), number(self.parity.get("limit"))
        return self.worst_error if share is None or limit is None else share * limit

    @property
    def limit_share(self) -> float | None:
        """The decisive error as a share of its limit: above 1 the gate failed."""
        given = number(self.parity.get("ratio"))
        limit = number(self.parity.get("limit"))
        if given is not None or not limit or self.worst_error is None:
            return given
        return self.worst_error / limit

    @cached_property
    def overall_vs_best(self) -> float | None:
        """Geometric mean of the speed-ups over the strongest PyTorch baseline."""
        return geometric_mean(self.speed_vs_best(name).value for name in self.points)

    @property
    def executed_text(self) -> str:
        """What really ran: runtime, device and precision."""
        parts = [self.executed.get(key) for key in ("runtime", "device", "precision")]
        return ", ".join(str(part) for part in parts if part)

    @property
    def parity_verdict(self) -> str:
        return known_status(self.parity.get("verdict"))

    @property
    def quality_verdict(self) -> str:
        return known_status(self.quality.get("verdict"))

    @property
    def has_interval(self) -> bool:
        """Quality was judged as a difference on labelled data."""
        return number(self.quality.get("difference")) is not None

    @property
    def rank(self) -> tuple[bool, int, float, str]:
        speed = self.overall_low or self.overall or 0.0
        return (not self.overall_winner, STATUSES.index(self.status), -speed, self.id)


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """The geometric mean of positive values; ``None`` where there are none or one is unknown."""
    logs = [math.log(value) if value is not None and value > 0 else None for value in values]
    known = [value for value in logs if value is not None]
    return math.exp(sum(known) / len(known)) if known and len(known) == len(logs) else None


@dataclass(frozen=True)
class TimedRow:
    """A row of the latency table: a variant or a PyTorch baseline."""

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
        self.eager = mapping(report, "baselines", "eager")
        self.compile = mapping(report, "baselines", "compile")

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
        baselines = [*mapping(self.eager, "points"), *mapping(self.compile, "points")]
        return list(dict.fromkeys([*named, *measured, *map(str, baselines)]))

    @cached_property
    def timed(self) -> list[VariantView]:
        """Variants with a speed-up at one operating point at least."""
        return [v for v in self.variants if any(v.speed(name).value is not None for name in v.points)]

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
        return dig(self.data, "verdict", "ok") is True

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
        tried = [v for v in self.variants if v.status != "skipped"]
        if self.routes or not tried:
            return None

        def distance(variant: VariantView) -> tuple[int, float, float]:
            share = variant.limit_share
            excess = max(1.0, share) if share is not None else math.inf
            return (STATUSES.index(variant.status), excess, -(variant.overall or 0.0))

        return min(tried, key=distance)

    @cached_property
    def latency_rows(self) -> list[tuple[str, list[TimedRow]]]:
        """Per operating point what was timed, the fastest first."""
        tables = []
        for name in self.points:
            baselines = (("eager PyTorch", self.eager), ("torch.compile", self.compile))
            rows = [TimedRow(label, mapping(data, "points", name), "baseline") for label, data in baselines]
            for variant in self.variants:
                tone = "chosen" if name in variant.selected_for else "plain"
                rows.append(TimedRow(variant.id, mapping(variant.points, name), tone))
            timed = [row for row in rows if number(row.figures.get("p50_ms")) is not None]
            if timed:
                tables.append((name, sorted(timed, key=lambda row: number(row.figures["p50_ms"]) or 0.0)))
        return tables

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
    def built_in_data(self) -> bool:
        """Some data set of the run was our own sentences, not the user's."""
        return any("built-in" in str(dig(item, "origin")) for item in self.part("data").values())
