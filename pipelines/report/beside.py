"""One model of a compression, read tolerantly: what it costs, and its quality and speed beside the teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.report.formats import dig, listing, mapping, metric_name, number, score, signed
from pipelines.report.variant import STATUSES, Speed, VariantView

BESIDE_EAGER, BESIDE_SAME = "times_teacher_eager", "times_teacher"
"""Keys of the document: speeds against the teacher in eager PyTorch, and against it on the same runner."""


@dataclass(frozen=True)
class Beside:
    """A model's quality beside that of another, in points (hundredths); without labels the agreement of the two."""

    value: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    verdict: str = ""
    metric: str = ""
    agreement: float | None = None
    agreement_name: str = ""

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Beside:
        told = mapping(record, "agreement") or (listing(record, "measures") or [{}])[0]
        return cls(
            value=number(record.get("variant")),
            difference=number(record.get("difference")),
            low=number(record.get("low")),
            high=number(record.get("high")),
            verdict=record["verdict"] if record.get("verdict") in STATUSES else "",
            metric=metric_name(record.get("metric")),
            agreement=number(dig(told, "value")),
            agreement_name=str(dig(told, "name") or "agreement"),
        )

    @property
    def ends(self) -> str:
        """The interval of the difference, empty where it is not known."""
        return "" if self.low is None or self.high is None else f"{signed(self.low)} to {signed(self.high)}"

    @property
    def loss(self) -> str:
        """The difference with its interval; empty where there are no labels to tell."""
        if self.difference is None:
            return ""
        return f"{signed(self.difference)} ({self.ends})" if self.ends else signed(self.difference)

    @property
    def sentence(self) -> str:
        """The difference in words, or else the agreement; empty where neither is known."""
        if self.difference is not None:
            ends = f" ({self.ends})" if self.ends else ""
            return f"{signed(self.difference)} points of {self.metric}{ends}"
        return "" if self.agreement is None else f"{self.agreement_name} with it {score(self.agreement)}"


@dataclass(frozen=True)
class Model:
    """A model on the way, or a variant that was selected.

    Attributes:
        name: As the document has it: ``2-distil``, or the variant's id.
        mark: What it is called in charts: the number of its step, or a letter.
        title: What was done, in a few words.
        bytes, parameters, non_zero, flops_per_token: Its cost; ``None`` where unknown.
        quality: Beside the teacher's.
        speeds: By runner, as the document has them.
        seconds: Time that making it took.
        variant: Where it is one.
    """

    name: str
    mark: str
    title: str
    bytes: float | None
    parameters: float | None
    non_zero: float | None
    flops_per_token: float | None
    quality: Beside
    speeds: Mapping[str, Any]
    seconds: float | None = None
    is_teacher: bool = False
    variant: VariantView | None = None

    def speed(self, runner: str, name: str) -> Speed:
        """How many times the teacher in eager PyTorch it is, run by `runner`, at an operating point."""
        return Speed.read(mapping(self.speeds, runner, BESIDE_EAGER, name), "speedup")

    def there(self, runner: str, name: str) -> Speed:
        """How many times the teacher it is where the teacher runs on the same runner."""
        return Speed.read(mapping(self.speeds, runner, BESIDE_SAME, name), "speedup")

    @property
    def sparsity(self) -> float | None:
        """The share of its parameters that are zero, where that is 1 % at least."""
        if not self.parameters or self.non_zero is None:
            return None
        share = 1 - self.non_zero / self.parameters
        return share if share >= 0.01 else None
