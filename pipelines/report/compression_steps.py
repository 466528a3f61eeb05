"""What a step of compression did, as facts and small tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.report.compression import CompressionView
from pipelines.report.compression_charts import training_panels
from pipelines.report.curves import Curve
from pipelines.report.formats import (
    count,
    dig,
    duration,
    large_count,
    listing,
    mapping,
    number,
    percent,
    shown,
    significant,
    words,
)

_TERMS = {"hard": "labels", "soft": "the teacher's answers"}


@dataclass(frozen=True)
class StepView:
    """A step as it is shown.

    Attributes:
        name: Its number and kind.
        title: What it did, in a few words.
        seconds: Time that it took, training included.
        facts: Names and texts.
        layers: By part (heads, neurons), the figures of each layer: left, and before where the layers are the same.
        matrices: Weight matrices and the share of each that is zero.
        settings: As the recipe has them.
        curves: Of its training.
    """

    name: str
    title: str
    seconds: float | None
    facts: list[tuple[str, str]]
    layers: list[tuple[str, list[tuple[str, str]]]]
    matrices: list[tuple[str, str]]
    settings: str
    curves: list[Curve] = field(default_factory=list)


def step_views(view: CompressionView) -> list[StepView]:
    """The steps of the document, in their order."""
    by_name = {hop.name: hop for hop in view.hops}
    metric = next((hop.quality.metric for hop in view.hops if hop.quality.difference is not None), "score")
    found = []
    for step in view.steps:
        name = str(step.get("name") or "unnamed")
        hop = by_name.get(name)
        found.append(
            StepView(
                name,
                "" if hop is None else hop.title,
                None if hop is None else hop.seconds,
                [(key, text) for key, text in _facts(step) if text],
                _layers(mapping(step, "removed")),
                _matrices(mapping(step, "removed")),
                ", ".join(_settings(mapping(step, "asked"))),
                training_panels(step, metric),
            )
        )
    return found


def _facts(step: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    yield "Student", shown(dig(step, "student", "made")) if dig(step, "student", "made") else ""
    yield from _removed(mapping(step, "removed"))
    yield from _shared(mapping(step, "shared"))
    training = mapping(step, "training")
    if not training:
        yield "Trained", "no"
        return
    yield "Trained", _trained(training)
    if dig(training, "teacher"):
        yield "Teacher", shown(training["teacher"])
    weights = mapping(training, "loss")
    terms = [
        f"{_TERMS.get(key, words(key))} {shown(value)}"
        for key, value in weights.items()
        if value and key != "temperature"
    ]
    if weights.get("soft"):
        terms.append(f"temperature {shown(weights.get('temperature'))}")
    yield "Loss", ", ".join(terms)


def _removed(removed: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    before, after = number(removed.get("tokens_before")), number(removed.get("tokens_after"))
    if before and after is not None:
        yield "Tokens", f"{count(after)} of {count(before)} kept ({percent(after / before, 2)})"
    longer, unknown = number(removed.get("tokens_per_text")), number(removed.get("unknown_share"))
    if longer is not None:
        told = f"{significant(removed.get('tokens_per_text_before'))} before, {significant(longer)} now"
        yield "Tokens of a text", told + ("" if unknown is None else f"; {percent(unknown, 2)} of them unknown")
    if number(removed.get("parameters_removed")) is not None:
        yield "Parameters", f"{large_count(removed['parameters_removed'])} fewer"
    if number(removed.get("sparsity")) is not None:
        pattern = f", in the pattern {shown(removed.get('pattern'))}" if removed.get("pattern") else ""
        yield "Weights at zero", f"{percent(removed['sparsity'])} of the matrices that were pruned{pattern}"
    for part in ("heads", "neurons"):
        old, new = _total(removed, "before", part), _total(removed, "after", part)
        if old and new is not None:
            yield part.capitalize(), f"{count(new)} of {count(old)} left ({percent(new / old, 2)})"
    layers = len(listing(removed, "before", "heads")), len(listing(removed, "after", "heads"))
    if layers[0] != layers[1]:
        yield "Layers", f"{layers[1]} of {layers[0]} left"
    if number(removed.get("rows")) is not None:
        yield "Importance", f"measured on {count(removed['rows'])} rows"


def _shared(shared: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    groups = [group for group in listing(shared, "layers") if isinstance(group, list)]
    if groups:
        yield "Layers that share", "; ".join("+".join(shown(number_) for number_ in group) for group in groups)
    if "embeddings" in shared:
        tied = dig(shared, "embeddings", "were_tied")
        yield "Embeddings", f"output and input use one table{' (they did already)' if tied else ''}"
    if shared.get("clusters"):
        yield "Values of a matrix", f"{count(shared['clusters'])} at most"


def _trained(training: Mapping[str, Any]) -> str:
    parts = [f"{count(training.get('steps'))} steps"]
    if number(training.get("epochs")) is not None:
        parts.append(f"{significant(training['epochs'], 2)} passes over {count(training.get('examples'))} rows")
    if number(training.get("seconds")) is not None:
        parts.append(duration(training["seconds"]))
    if training.get("precision"):
        parts.append(shown(training["precision"]))
    devices = number(training.get("devices"))
    parts += [f"on {count(devices)} devices"] if devices and devices > 1 else []
    if training.get("resumed_at"):
        parts.append(f"went on from step {count(training['resumed_at'])} after an interruption")
    return ", ".join(parts)


def _total(removed: Mapping[str, Any], when: str, part: str) -> float | None:
    known = [number(value) for value in listing(removed, when, part)]
    return sum(value for value in known if value is not None) if known else None


def _layers(removed: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    found = []
    for part in ("heads", "neurons"):
        before, after = listing(removed, "before", part), listing(removed, "after", part)
        same = len(before) == len(after)
        # Where layers went too, which they were is not said: only what is left of each.
        cells = [(count(left), f"of {count(before[i])}" if same else "") for i, left in enumerate(after)]
        if cells and (not same or before != after):
            found.append((part, cells))
    return found


def _matrices(removed: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, percent(share)) for name, share in mapping(removed, "by_matrix").items()]


def _settings(asked: Mapping[str, Any]) -> Iterable[str]:
    for key, value in asked.items():
        if isinstance(value, Mapping):
            if told := ", ".join(_settings(value)):
                yield f"{words(key)} ({told})"
        elif value not in (None, False, "", [], {}):
            yield words(key) if value is True else f"{words(key)} {shown(value)}"
