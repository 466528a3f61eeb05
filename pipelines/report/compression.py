"""The compression of a report document as people are told it: every model on the way beside the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from pipelines.baselines import EAGER, PORTABLE
from pipelines.report.beside import BESIDE_EAGER, Beside, Model
from pipelines.report.formats import listing, mapping, number, percent, point, ratio, score
from pipelines.report.variant import STATUSES, VariantView, geometric_mean
from pipelines.verification.latency_result import spoils

TEACHER = "the teacher in eager PyTorch"


class CompressionView:
    """What the document says about compression, read tolerantly.

    Args:
        data: ``compression`` of manifest or report.
        variants: Those of the document: what conversion alone cost stands in their gates.
        overall: The id of the variant that was selected overall.
    """

    def __init__(self, data: Mapping[str, Any], variants: Sequence[VariantView], overall: str | None) -> None:
        self.data, self._overall = data, overall
        self.labelled = data.get("labelled") is True
        self.rows = number(data.get("rows"))
        self.gate = mapping(data, "gate")
        items = [item for item in listing(data, "hops") if isinstance(item, Mapping)]
        self.hops = [self._hop(item) for item in items]
        by_id = {variant.id: variant for variant in variants}
        chosen = [(str(id_), item) for id_, item in mapping(data, "selected").items() if isinstance(item, Mapping)]
        chosen.sort(key=lambda item: item[0] != overall)
        self.selected = [self._variant(i, id_, item, by_id.get(id_)) for i, (id_, item) in enumerate(chosen)]
        self.steps = [step for step in listing(data, "steps") if isinstance(step, Mapping)]

    def _hop(self, item: Mapping[str, Any]) -> Model:
        name = str(item.get("name") or "unnamed")
        number_of_step = name.partition("-")[0]
        size = mapping(item, "size")
        return Model(
            name=name,
            mark=number_of_step if number_of_step.isdigit() else "0",
            title=str(item.get("title") or ""),
            bytes=number(size.get("bytes")),
            parameters=number(size.get("parameters")),
            non_zero=number(size.get("non_zero")),
            flops_per_token=number(size.get("flops_per_token")),
            quality=Beside.read(mapping(item, "quality")),
            speeds=mapping(item, "speed"),
            seconds=number(item.get("seconds")),
            is_teacher=name == self.data.get("teacher"),
        )

    def _variant(self, index: int, id_: str, item: Mapping[str, Any], variant: VariantView | None) -> Model:
        # What is converted has the parameters and operations of the model that it is made from.
        return Model(
            name=id_,
            mark=chr(97 + index % 26),
            title="",
            bytes=number(item.get("bytes")),
            parameters=None,
            non_zero=None,
            flops_per_token=None,
            quality=Beside.read(mapping(item, "quality")),
            speeds={id_: {BESIDE_EAGER: mapping(item, BESIDE_EAGER)}},
            variant=variant,
        )

    @cached_property
    def teacher(self) -> Model | None:
        return next((hop for hop in self.hops if hop.is_teacher), None)

    @cached_property
    def student(self) -> Model | None:
        """The model that is exported."""
        return self.hops[-1] if self.hops else None

    @cached_property
    def way(self) -> list[Model]:
        """The models from the teacher on: what was before it (no model of the task yet, or a worse one) is no loss."""
        return self.hops[self.hops.index(self.teacher) :] if self.teacher is not None else self.hops

    @cached_property
    def overall(self) -> Model | None:
        return next((model for model in self.selected if model.name == self._overall), None)

    def chosen(self, id_: str | None) -> Model | None:
        """A selected variant by its id."""
        return next((model for model in self.selected if model.name == id_), None)

    def share(self, model: Model, cost: str) -> float | None:
        """A cost (the name of an attribute of `Model`) as a share of the teacher's."""
        mine = getattr(model, cost)
        theirs = None if self.teacher is None else getattr(self.teacher, cost)
        return mine / theirs if mine is not None and theirs else None

    @cached_property
    def runners(self) -> list[str]:
        """What the models on the way were timed with, PyTorch first."""
        found = dict.fromkeys(str(runner) for hop in self.hops for runner in hop.speeds)
        return sorted(found, key=lambda runner: runner != EAGER)

    @cached_property
    def runner(self) -> str:
        """What speeds of models are told of where there is room for one: the runtime that runs everywhere."""
        return PORTABLE if PORTABLE in self.runners else (self.runners or [EAGER])[0]

    @cached_property
    def points(self) -> list[str]:
        """The operating points at which anything was timed."""
        figures = [mapping(m.speeds, runner, BESIDE_EAGER) for m in (*self.hops, *self.selected) for runner in m.speeds]
        return list(dict.fromkeys(str(name) for by_point in figures for name in by_point))

    @cached_property
    def point(self) -> str | None:
        """The operating point that is told of where there is room for one: the one with the median speed-up."""
        model = self.overall or self.student
        if model is None:
            return None
        runner = model.name if model is self.overall else self.runner
        timed = [(value, name) for name in self.points if (value := model.speed(runner, name).value) is not None]
        return sorted(timed)[(len(timed) - 1) // 2][1] if timed else None

    def speed_overall(self, model: Model) -> float | None:
        """The geometric mean of a variant's speed-ups over the operating points."""
        return geometric_mean(
            model.speed(model.name, name).value for name in mapping(model.speeds, model.name, BESIDE_EAGER)
        )

    @property
    def notes(self) -> list[str]:
        return [str(note) for note in listing(self.data, "notes") if note]

    @property
    def busy(self) -> float | None:
        """The share of the processors that other programs took, where that spoils the speeds."""
        share = number(self.data.get("busy_elsewhere"))
        return share if spoils(share) else None

    @property
    def verdict(self) -> str:
        """That of the gate: ``skipped`` where the loss is not known."""
        return self.gate["verdict"] if self.gate.get("verdict") in STATUSES else "skipped"

    @property
    def failed(self) -> bool:
        """The model is not one to ship, however well it was converted."""
        return self.verdict in ("failed", "inconclusive")

    @cached_property
    def loss(self) -> str:
        """What the exported model lost, in words, before conversion."""
        return "" if self.student is None else self.student.quality.sentence

    @property
    def budget(self) -> str:
        """What may be lost; empty where that is not said."""
        drop, worst = number(self.gate.get("max_drop")), number(self.gate.get("max_drop_worst"))
        if drop is None:
            return ""
        return f"; {drop:g} may be lost" + (f", {worst:g} at the interval's bad end" if worst is not None else "")

    @cached_property
    def gate_sentence(self) -> str:
        """Whether compression kept its budget."""
        loss = f"{self.loss or 'by how much is not told'}{self.budget}"
        reason = str(self.gate.get("reason") or "")
        if self.verdict == "passed":
            return f"Compression kept its budget: {loss}"
        if self.verdict == "failed":
            return f"Compression lost too much: {loss}"
        if self.verdict == "inconclusive":
            return f"Whether compression kept its budget is not certain: {reason or loss}"
        q = Beside() if self.student is None else self.student.quality
        name = f"{q.agreement_name[:1].upper()}{q.agreement_name[1:]}"
        known = "" if q.agreement is None else f". {name} with the teacher: {score(q.agreement)}"
        return f"What compression lost is not known: {reason or 'it was not measured'}{known}"

    @cached_property
    def over_budget(self) -> list[Model]:
        """Selected variants that lost too much against the teacher, though compression alone did not."""
        return [m for m in self.selected if m.quality.verdict == "failed" and m.quality.loss and not self.failed]

    def sentence(self) -> str:
        """The verdict on a bundle in a sentence: what is shipped, against the teacher."""
        if self.failed:
            return f"Do not ship: {self.gate_sentence[:1].lower()}{self.gate_sentence[1:]}"
        model = self.overall
        if model is None:
            return "Do not ship: no variant passed its gates"
        share = self.share(model, "bytes")
        speed = "" if self.busy else self._speed_sentence(model)
        whose = "its" if speed else "the teacher's"
        told = [speed, "" if share is None else f"{percent(share, 2)} of {whose} size"]
        told.append(model.quality.sentence or (f"{self.loss} before conversion" if self.loss else ""))
        text = f"Ship {model.name}: {', '.join(part for part in told if part) or 'it passed its gates'}"
        if self.busy:
            text += f". How fast it is was not to be seen: other programs took {self.busy:.0%} of the processors"
        elif not self.labelled:
            text += ". Without labels what it lost is not known"
        return text

    def _speed_sentence(self, model: Model) -> str:
        timed = [(v, name) for name in self.points if (v := model.speed(model.name, name).value) is not None]
        if not timed:
            return ""
        (least, _), (most, where) = min(timed), max(timed)
        if len(timed) == 1:
            return f"{ratio(most)} {TEACHER} at {point(where)}"
        return f"{ratio(least)} to {ratio(most)} {TEACHER} (most at {point(where)})"
