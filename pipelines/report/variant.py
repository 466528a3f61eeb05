"""One variant of the report document, read tolerantly: its figures, its verdicts and its place in the order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipelines.report.formats import dig, mapping, number, point

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
        """Speed-up over the reference (mostly eager PyTorch) at the operating point `name`."""
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
        speed = self.overall or 0.0
        return (not self.overall_winner, STATUSES.index(self.status), -speed, self.id)


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """The geometric mean of positive values; ``None`` where there are none or one is unknown."""
    logs = [math.log(value) if value is not None and value > 0 else None for value in values]
    known = [value for value in logs if value is not None]
    return math.exp(sum(known) / len(known)) if known and len(known) == len(logs) else None
