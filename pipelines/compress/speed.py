"""A race between a checkpoint, its dense twin and what is left without its dead parts, on every target that is here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from exporter.errors import RequestError
from pipelines.baselines import EAGER
from pipelines.compress.forms import DENSE, FOUND, SMALLER
from pipelines.progress import Progress

if TYPE_CHECKING:
    from pipelines.cache import Cache
    from pipelines.verification.worker_process import WorkerSpec

POINTS = ("1x32", "8x128")
_CALLED = {DENSE: "dense twin", FOUND: "checkpoint", SMALLER: "checkpoint without its dead parts"}


def race_fields(
    task: str, points: Sequence[str] | None, targets: Sequence[str] | None, budget_s: float, threads: int, trust: bool
) -> dict[str, Any]:
    """The recipe of a race, without the source.

    Args:
        task: Name of the task.
        points: Operating points; by default those of `POINTS` that the model takes.
        targets: Names of targets; by default all.
        budget_s: Seconds to measure for.
        threads: Compute threads.
        trust: Run the checkpoint's own Python code.

    Raises:
        RequestError: A point or a target is none.
    """
    from pipelines.recipe import Recipe

    fields: dict[str, Any] = {
        "task": task,
        "trust_remote_code": trust,
        "threads": threads,
        "precisions": ["fp32"],
        "require": [],
        "data": {"limit": 16},
        "parity": {"samples": 4},
        "latency": {"points": list(points or POINTS), "baselines": ["eager"], "budget_s": budget_s},
    }
    if targets is not None:
        fields["targets"] = list(targets)
    Recipe(source="any", **fields)  # what is wrong with it is said before any work
    return fields


def race_forms(forms: Mapping[str, str], fields: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Time every form in FP32 in one race: eager PyTorch, and each target that runs here.

    Args:
        forms: Folder or specification by form; `DENSE` is what the others are compared with.
        fields: Of the recipe, see `race_fields`.
        progress: Tells how it goes.

    Returns:
        ``points``, ``ratios`` (by target, by form, see `ratios_of`), ``skipped`` (why a target was not measured),
        ``notes``, ``busy_elsewhere``, ``race`` (every figure). Where nothing can be timed because the model cannot be
        exported or takes none of the points: ``skipped_all`` (why) and no ratios.
    """
    from pipelines.cache import Cache

    with Cache() as cache:
        try:
            return _race(forms, fields, cache, progress)
        except RequestError as error:
            return {"skipped_all": str(error), "points": [], "ratios": {}, "skipped": {}, "busy_elsewhere": None}


def _race(forms: Mapping[str, str], fields: Mapping[str, Any], cache: Cache, progress: Progress) -> dict[str, Any]:
    from pipelines.cache import log_folder
    from pipelines.recipe import Recipe
    from pipelines.runner import ready_to_race
    from pipelines.verification.latency import Plan, measure

    points: list[str] = []
    files: dict[str, Any] = {}
    specs: list[WorkerSpec] = []
    skipped: dict[str, str] = {}
    for form, spec in forms.items():
        progress.say(f"What the {_CALLED[form]} becomes:")
        bench, variants = ready_to_race(Recipe.from_source(spec, **fields), cache, progress)
        points = bench.recorded.record["points"]
        files = files or bench.point_files(points)
        timed = [judged for judged in variants if judged.runs_here]
        skipped |= {judged.candidate.variant.id: judged.status[1] for judged in variants if not judged.runs_here}
        specs += [replace(w, name=f"{w.name}@{form}", is_baseline=False) for w in bench.workers(timed, [EAGER])]
    order = {name: at for at, name in enumerate(dict.fromkeys(spec.name.partition("@")[0] for spec in specs))}
    specs.sort(key=lambda spec: order[spec.name.partition("@")[0]])  # what is compared is alive together
    with progress.step("Measure latency"):
        result = measure(
            specs,
            files,
            log=log_folder() / "certify.log",
            plan=Plan(budget_s=fields["latency"]["budget_s"]),
            baseline=f"{EAGER}@{DENSE}",
            best_of=(),
            on_line=progress.update,
        )
    race = result.to_dict()
    return {
        "points": points,
        "ratios": ratios_of(race, list(forms)),
        "skipped": skipped,
        "notes": race["notes"],
        "busy_elsewhere": race["busy_elsewhere"],
        "race": race,
    }


def ratios_of(race: Mapping[str, Any], forms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How many times faster than its dense twin each other form is, by target.

    Returns:
        By target and form ``{"value", "low", "high", "rounds", "points": {label: the same}}``, the first of the
        geometric mean over the points, or ``{"error": why}``.
    """
    from pipelines.verification.latency_result import compare, geometric_mean, read_rounds

    workers, seed = race["variants"], race["seed"]
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(worker.partition("@")[0] for worker in workers):
        for form in forms:
            if form == DENSE or f"{name}@{form}" not in workers or f"{name}@{DENSE}" not in workers:
                continue
            pair = [workers[f"{name}@{DENSE}"], workers[f"{name}@{form}"]]
            failed = next((worker["error"] for worker in pair if worker["error"]), None)
            if failed:
                found.setdefault(name, {})[form] = {"error": failed}
                continue
            base = workers.get(race["baseline"], {"points": {}})["points"]
            rounds = {
                label: [read_rounds(worker["points"][label]) for worker in pair]
                + [read_rounds(base[label]) if label in base else {}]
                for label in race["points"]
            }
            overall = [geometric_mean([rounds[label][at] for label in rounds]) for at in range(3)]
            total = compare(*overall, seed=seed)
            points = {label: compare(*rounds[label], seed=seed) for label in rounds}
            found.setdefault(name, {})[form] = {
                **({"error": "no round was shared"} if total is None else total.to_dict()),
                "points": {label: None if ratio is None else ratio.to_dict() for label, ratio in points.items()},
            }
    return found
