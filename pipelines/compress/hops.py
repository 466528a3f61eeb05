"""Every model on the way measured alike: quality beside the teacher's, and speed in one race on the same runtimes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exporter.artifact import Artifact, Variant
from exporter.errors import PlanishError
from exporter.targets import get_target
from pipelines.artifacts import export_onnx
from pipelines.baselines import EAGER
from pipelines.compress.run import Compressed, Hop
from pipelines.judging import RACE_CODE, Bench, Judged, device_of, gate_settings
from pipelines.opening import OPENER, opening
from pipelines.plan import original_key
from pipelines.recording import original_of, record_original
from pipelines.verification.latency_result import compare, read_rounds, spoils
from pipelines.workshop import GPU, ONNX, TORCH, Made

COMPARED = {"cpu": ("onnxruntime-cpu", "openvino-cpu"), "cuda": ("onnxruntime-cuda",)}
"""By device, the targets on which every model is timed in FP32: those that take the plain ONNX export."""
SEPARATOR = " on "


@dataclass(frozen=True)
class Measured:
    """What is known of one hop before the race.

    Attributes:
        hop: The model.
        recorded: What it said on the evaluation data.
        original: How it is opened.
        exported: Its plain FP32 ONNX; ``None`` where it could not be exported.
    """

    hop: Hop
    recorded: Made
    original: dict[str, Any]
    exported: Artifact | None
    exported_id: str = ""


def measure_hops(bench: Bench, compressed: Compressed, data_id: dict[str, Any]) -> list[Measured]:
    """Run every model on the evaluation data and export it plainly."""
    shop, recipe = bench.shop, bench.recipe
    found = []
    for hop in compressed.hops:
        original = original_of(recipe, hop.source)
        identity = original_key(original)
        last = hop is compressed.hops[-1]
        title = f"Run {hop.name}"
        recorded = (
            bench.recorded
            if last
            else record_original(shop, recipe, original, identity, bench.data, data_id, (), title=title)
        )
        exported, exported_id = None, ""
        try:
            made = export_onnx(shop, original, identity, recipe.export)
            raw = Artifact.from_dict(made.record["artifact"])
            exported = Artifact(made.folder / raw.path, raw.format, raw.signature, raw.contract)
            exported_id = made.id
        except PlanishError as error:
            if last or error.exit_status in (3, 130):
                raise
            shop.progress.say(f"{hop.name} cannot be exported, so it is timed in PyTorch alone: {error}")
        found.append(Measured(hop, recorded, original, exported, exported_id))
    return found


def compare_quality(
    bench: Bench, hops: Sequence[Measured], teacher: Measured, variants: Sequence[Judged]
) -> dict[str, Any]:
    """Quality of every model and of the `variants` beside the teacher's (`pipelines.compress.comparing.compare`)."""
    recipe, record = bench.recipe, bench.recorded.record
    asked = recipe.compress
    budget = {"max_drop": asked.max_drop, "max_drop_worst": asked.max_drop_worst or 2 * asked.max_drop}
    settings = gate_settings(recipe) | budget
    others = {measured.hop.name: measured.recorded for measured in hops}
    for judged in variants:
        if judged.checked is not None and judged.gates["quality"]["verdict"] != "skipped":
            others[judged.candidate.variant.id] = judged.checked
    made = bench.shop.make(
        "compare-hops",
        "Compare with the teacher",
        "pipelines.compress.comparing:compare",
        {
            "teacher": str(teacher.recorded.folder),
            "others": {name: str(made.folder) for name, made in others.items()},
            "original": bench.original,
            "signature": record["signature"],
            "contract": record["contract"],
            "data": bench.data,
            "settings": settings,
            "seed": recipe.seed,
        },
        inputs={
            "teacher": teacher.recorded.id,
            "others": {name: made.id for name, made in others.items()},
            "settings": settings,
            "seed": recipe.seed,
        },
        packages=("numpy", "scipy"),
    )
    return made.record


def race_hops(bench: Bench, hops: Sequence[Measured], teacher: Measured, selected: Sequence[Judged]) -> dict[str, Any]:
    """Time every model in PyTorch and on `COMPARED`, and the selected variants, all against the teacher in PyTorch.

    Where a selected variant runs on the GPU, PyTorch does too, and the models are compared there.

    Models whose inputs are not those of the last are left out, and named in ``notes``.
    """
    shop, recipe, points = bench.shop, bench.recipe, bench.recorded.record["points"]
    if not points:
        return {}
    inputs = [spec["name"] for spec in bench.recorded.record["signature"]["inputs"]]
    same = [m for m in hops if [spec["name"] for spec in m.recorded.record["signature"]["inputs"]] == inputs]
    if teacher not in same:
        return {"notes": [f"{teacher.hop.name} takes other inputs, so nothing was timed against it."]}
    device = device_of(selected)
    here = (name for name in COMPARED[device] if get_target(name).availability().available)
    targets = [name for name in here if name in recipe.targets]
    key = shop.key(
        "race-hops",
        (*RACE_CODE, "pipelines.compress.hops"),
        inputs={
            "hops": {m.hop.name: [m.hop.source.digest, m.exported_id] for m in same},
            "selected": {judged.candidate.variant.id: judged.identity for judged in selected},
            "teacher": teacher.hop.source.digest,
            "targets": targets,
            "device": device,
            "recorded": bench.recorded.id,
            "points": list(points),
            "latency": recipe.latency.model_dump(mode="json", include={"budget_s", "min_block_ms"}),
            "seed": recipe.seed,
        },
        packages=(*ONNX, *TORCH, *GPU, "openvino"),
        bound_to_machine=True,
        timed=True,
    )
    race = shop.measure(
        key,
        "Time every model",
        lambda: _race(bench, same, teacher, targets, device, selected, points),
        worth=lambda race: not spoils(race["busy_elsewhere"]),
    )
    left_out = [f"{m.hop.name} takes other inputs and was not timed." for m in hops if m not in same]
    return {**race, "notes": [*race.get("notes", []), *left_out]}


def _race(
    bench: Bench,
    hops: Sequence[Measured],
    teacher: Measured,
    targets: Sequence[str],
    device: str,
    selected: Sequence[Judged],
    points: Sequence[str],
) -> dict[str, Any]:
    from pipelines.verification.latency import Plan, measure
    from pipelines.verification.worker_process import WorkerSpec

    threads = bench.shop.threads
    specs = []
    for measured in hops:
        heavy = 2 * measured.hop.source.weights_bytes + 300_000_000
        how = {"original": measured.original, "precision": "fp32", "device": device}
        name = measured.hop.name + SEPARATOR + EAGER
        opener = "exporter.targets.pytorch:open_eager"
        specs.append(
            WorkerSpec(name, opener, how, threads, estimated_bytes=heavy + 200_000_000, is_baseline=measured is teacher)
        )
        if measured.exported is None:
            continue
        for target in targets:
            arguments = opening(Variant(target, "fp32"), measured.exported)
            name = f"{measured.hop.name}{SEPARATOR}{target}-fp32"
            specs.append(
                WorkerSpec(name, OPENER, arguments, threads, files=(measured.exported.path,), estimated_bytes=heavy)
            )
    specs += bench.workers(selected, ())
    latency = bench.recipe.latency
    return measure(
        specs,
        bench.point_files(points),
        log=bench.shop.log,
        plan=Plan(budget_s=latency.budget_s, min_block_ms=latency.min_block_ms, seed=bench.recipe.seed),
        baseline=teacher.hop.name + SEPARATOR + EAGER,
        best_of=(),
        on_line=bench.shop.progress.update,
    ).to_dict()


def speed_of(race: Mapping[str, Any], name: str, against: str, *, seed: int) -> dict[str, dict[str, Any]]:
    """By point, how fast a session of the race is: median in ms, and times the speed of another, with the interval."""
    sessions = {**race.get("baselines", {}), **race.get("variants", {})}
    mine, theirs, base = (sessions.get(n, {}).get("points", {}) for n in (name, against, race.get("baseline")))
    found = {}
    for label, point in mine.items():
        if label not in theirs or label not in base:
            continue
        ratio = compare(*(read_rounds(points[label]) for points in (theirs, mine, base)), seed=seed)
        if ratio is not None:
            ends = {"speedup": ratio.value, "speedup_low": ratio.low, "speedup_high": ratio.high}
            found[label] = {"p50_ms": point["p50_ms"], **ends}
    return found
