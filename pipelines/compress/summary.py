"""What compression did, as one document: every model on the way, and what was selected, beside the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.baselines import EAGER
from pipelines.compress.hops import SEPARATOR, Measured, compare_quality, measure_hops, race_hops, speed_of
from pipelines.compress.run import Compressed
from pipelines.judging import Bench, Judged

_KEPT = (
    "verdict",
    "reason",
    "metric",
    "original",
    "original_low",
    "original_high",
    "variant",
    "difference",
    "low",
    "high",
)
"""Of a quality record, what the document keeps; the rest is settings."""


@dataclass(frozen=True)
class Compression:
    """What a run with compression adds to its results.

    Attributes:
        document: For manifest and report.
        evidence: The whole of what was measured.
    """

    document: dict[str, Any]
    evidence: dict[str, Any]


def sum_up(
    bench: Bench,
    compressed: Compressed,
    data_id: dict[str, Any],
    variants: Sequence[Judged],
    selected: Mapping[str, str | None],
) -> Compression:
    """Measure every model on the way, and the selected variants, beside the teacher.

    Args:
        bench: That of the exported model.
        compressed: The models.
        data_id: What identifies the evaluation data.
        variants: Judged.
        selected: By operating point and ``overall``, ids.
    """
    hops = measure_hops(bench, compressed, data_id)
    teacher = next(measured for measured in hops if measured.hop.name == compressed.teacher)
    chosen = [judged for judged in variants if judged.candidate.variant.id in set(selected.values())]
    quality = compare_quality(bench, hops, teacher, chosen)
    race = race_hops(bench, hops, teacher, chosen)
    document = describe(compressed, hops, quality, race, chosen, seed=bench.recipe.seed)
    steps = [{"name": hop.name, "record": hop.record} for hop in compressed.hops]
    return Compression(document, {"steps": steps, "quality": quality, "race": race})


def describe(
    compressed: Compressed,
    hops: Sequence[Measured],
    quality: Mapping[str, Any],
    race: Mapping[str, Any],
    chosen: Sequence[Judged],
    *,
    seed: int,
) -> dict[str, Any]:
    """The document.

    Returns:
        ``teacher`` (a name), ``labelled``, ``rows``; ``hops``, for each ``name``, ``title``, ``kind``, ``digest``,
        ``size``, ``quality`` (beside the teacher) and ``speed`` by runner (``times_teacher_eager``: against the teacher
        in PyTorch; ``times_teacher``: against the teacher on the same runner; ``times_before``: against the model
        before there); ``selected``: the same by variant id;
        ``gate``: whether the exported model keeps the budget against the teacher; ``busy_elsewhere``: as in
        `LatencyResult`, while they were timed.
    """
    teacher = compressed.teacher
    eager = teacher + SEPARATOR + EAGER
    sessions = [*race.get("baselines", {}), *race.get("variants", {})]
    told = []
    for number, measured in enumerate(hops):
        hop, before = measured.hop, hops[max(0, number - 1)].hop.name
        runners = [name.split(SEPARATOR, 1)[1] for name in sessions if name.startswith(hop.name + SEPARATOR)]
        speed = {
            runner: {
                "times_teacher_eager": speed_of(race, hop.name + SEPARATOR + runner, eager, seed=seed),
                "times_teacher": speed_of(race, hop.name + SEPARATOR + runner, teacher + SEPARATOR + runner, seed=seed),
                "times_before": speed_of(race, hop.name + SEPARATOR + runner, before + SEPARATOR + runner, seed=seed),
            }
            for runner in runners
        }
        told.append(
            {
                "name": hop.name,
                "title": hop.title,
                "kind": hop.kind,
                "digest": hop.source.digest,
                "seconds": hop.seconds,
                "size": hop.record.get("size")
                or {"parameters": measured.recorded.record["parameters"], "bytes": hop.source.weights_bytes},
                "quality": _kept(quality["models"][hop.name]),
                "speed": speed,
            }
        )
    selected = {
        judged.candidate.variant.id: {
            "bytes": sum(path.stat().st_size for path in judged.files),
            "quality": _kept(quality["models"].get(judged.candidate.variant.id, {})),
            "times_teacher_eager": speed_of(race, judged.candidate.variant.id, eager, seed=seed),
        }
        for judged in chosen
    }
    return {
        "teacher": teacher,
        "labelled": quality["labelled"],
        "rows": quality["rows"],
        "hops": told,
        "selected": selected,
        "gate": gate(quality, compressed),
        "notes": list(race.get("notes", ())),
        "busy_elsewhere": race.get("busy_elsewhere"),
    }


def gate(quality: Mapping[str, Any], compressed: Compressed) -> dict[str, Any]:
    """Whether the compressed model keeps its budget; skipped where the data have no labels to tell."""
    record = quality["models"][compressed.hops[-1].name]
    if not quality["labelled"] or record.get("metric") is None:
        reason = "the evaluation data have no labels that the task's metric takes"
        return {"verdict": "skipped", "reason": reason}
    return {
        key: record[key] for key in ("verdict", "reason", "difference", "low", "high", "max_drop", "max_drop_worst")
    }


def _kept(record: Mapping[str, Any]) -> dict[str, Any]:
    measures = record.get("measures") or []
    kept = {key: record[key] for key in _KEPT if key in record}
    return kept | ({"agreement": measures[0]} if measures else {})
