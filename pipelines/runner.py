"""A run: from a recipe to a bundle."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.errors import EnvironmentLackError, GateError, PlanishError, RequestError
from exporter.preprocess import read_labels
from exporter.sources import resolve_source
from exporter.tasks import get_task, infer_task
from pipelines import assemble
from pipelines.artifacts import Artifacts, export_onnx, export_program, make_artifacts, with_needs
from pipelines.bundle import Bundle, check_out, read_bundle, write_bundle
from pipelines.cache import Cache, log_folder
from pipelines.digests import path_digest
from pipelines.judging import Bench, Judged, add_timings, locate
from pipelines.lanes import lanes_for
from pipelines.plan import PROGRAMS, candidates, ingredients, original_key, refuse_unoffered
from pipelines.progress import Progress
from pipelines.quantizing import Learning
from pipelines.recipe import Recipe, data_format, recipe_digest, usable_cores
from pipelines.recording import original_of, record_original
from pipelines.searching import kept_forms
from pipelines.verification.latency_result import spoils
from pipelines.workshop import Made, Workshop

if TYPE_CHECKING:
    from exporter.sources import Source

__all__ = ["bench_source", "named", "outcome", "ready_to_race", "run", "workshop"]


def run(
    recipe: Recipe,
    *,
    out: Path | str | None = None,
    overwrite: bool = False,
    use_cache: bool = True,
    progress: Progress | None = None,
) -> Bundle:
    """Run a recipe and write its bundle.

    What earlier runs made is taken from the cache; a bundle that is there and up to date is returned as it is.

    Args:
        recipe: What to do.
        out: Where the bundle goes (default: ``bundles/<name>``).
        overwrite: Replace a bundle of another source or recipe, one that another version of Planish made, or one that
            was timed on a busy machine.
        use_cache: Read and keep stages.
        progress: Tells how it goes (default: nothing).

    Returns:
        The bundle, also where no variant passed: `outcome` says what it is worth.

    Raises:
        RequestError: The recipe, the source or the data are wrong, or `out` is taken.
        EnvironmentLackError: Something is missing here.
    """
    progress = progress or Progress(quiet=True)
    refuse_unoffered(recipe)
    recipe, source = named(recipe)
    folder = Path("bundles") / str(recipe.name) if out is None else Path(out)
    if not recipe.compress.steps:
        _refuse_bad_metric(recipe, source)
    resolved = recipe.resolved()  # once: it reads the data for their digest
    digest = recipe_digest(resolved)
    state = check_out(folder, source.digest, digest, overwrite)
    if state == "up-to-date":
        there = read_bundle(folder)
        stale = _stale(there)
        if not (overwrite and stale):
            hint = f", but {stale}: --overwrite makes it anew" if stale else ""
            progress.say(f"{folder} is up to date{hint}")
            return there
        state = "replace"
    with Cache() if use_cache else Cache.disabled() as cache:
        shop = workshop(cache, progress, recipe, source)
        progress.say(f"{source.spec}: {recipe.task}, log in {shop.log}")
        results = _work(shop, recipe, resolved, source)
        try:
            return _write(results, folder, replace=state == "replace")
        except RequestError:
            with suppress(RequestError):  # that of the first try says what is wrong
                # Another run may have written the same bundle there meanwhile.
                if check_out(folder, source.digest, digest, overwrite=False) == "up-to-date":
                    progress.say(f"{folder} was written by another run of the same")
                    return read_bundle(folder)
            raise


def _stale(bundle: Bundle) -> str:
    """Why a bundle of the same source and recipe might be made anew all the same; empty where nothing says so."""
    made_by, here = bundle.manifest.planish_version, assemble.planish_version()
    if made_by != here:
        return f"Planish {made_by} made it, and this is {here}"
    if spoils(bundle.manifest.environment.get("busy_elsewhere")):
        return "other programs kept the machine busy while it was timed"
    return ""


def outcome(bundle: Bundle) -> GateError | None:
    """Why a bundle is not one to ship, or ``None``: a variant was selected, and every required one passed."""
    required = bundle.manifest.recipe.get("require", ())
    for name in required:
        entry = bundle.variants.get(name)
        if entry is None or entry.status != "passed":
            reason = "it was not made" if entry is None else f"{entry.status}: {entry.reason}"
            return GateError("a required variant did not pass", f"{name} ({reason})", f"See {bundle.path}/report.html")
    gate = (bundle.manifest.compression or {}).get("gate", {})
    if gate.get("verdict") in ("failed", "inconclusive"):
        said = f"{gate['verdict']}: {gate['reason']}"
        return GateError("compression lost more than compress.max_drop allows", said, f"See {bundle.path}/report.html")
    if bundle.manifest.selected.get("overall") is None:
        return GateError("no variant passed its gates", bundle.path, "The report says what came closest")
    return None


def bench_source(recipe: Recipe, *, progress: Progress | None = None) -> dict[str, Any]:
    """Time what a source becomes, without judging it: the race alone, as ``evidence/latency.json`` has it."""
    with Cache() as cache:
        bench, variants = ready_to_race(recipe, cache, progress or Progress(quiet=True))
        race = bench.race(variants, bench.recorded.record["points"], anew=True)
        left_out = [f"Not measured at {reason}" for reason in bench.recorded.record["dropped_points"]]
        return {**race, "notes": [*race.get("notes", []), *left_out]} if left_out else race


def ready_to_race(recipe: Recipe, cache: Cache, progress: Progress) -> tuple[Bench, list[Judged]]:
    """Make everything that a source becomes, unjudged, so that `Bench.race` or `Bench.workers` takes it.

    Args:
        recipe: Names source, targets, precisions and operating points.
        cache: Open for as long as the files are used.
        progress: Tells how it goes.
    """
    refuse_unoffered(recipe)
    recipe, source = named(recipe)
    shop = workshop(cache, progress, recipe, source)
    bench, _, variants, _ = _make(shop, recipe, recipe.resolved(), source)
    for judged in variants:
        if judged.artifact is not None and not judged.candidate.skip:
            judged.executed = {}
    return bench, variants


def _work(shop: Workshop, recipe: Recipe, resolved: dict[str, Any], source: Source) -> assemble.Results:
    compressed = None
    if recipe.compress.steps:
        from pipelines.compress.run import compress

        _refuse_bad_data(recipe, None)
        compressed = compress(shop, recipe, resolved, source)
    exported = source if compressed is None else compressed.source
    _refuse_bad_metric(recipe, exported)
    bench, artifacts, variants, learning = _make(shop, recipe, resolved, exported)
    bench.check_all(variants, artifacts)
    points = bench.recorded.record["points"]
    if recipe.calibration.search:
        # The last point is the largest: there a layer's share of the time shows best.
        variants = kept_forms(bench, artifacts, variants, learning, points[-1] if points else None)
    race = bench.race(variants, points)
    add_timings(variants, race, recipe.latency.min_speedup)
    results = assemble.Results(
        name=str(recipe.name),
        task=str(recipe.task),
        source=exported,
        origin=source,
        recipe=resolved,
        recorded=bench.recorded,
        artifacts=artifacts,
        variants=variants,
        race=race,
        points=points,
        timeline=shop.timeline,
    )
    if compressed is None:
        return results
    from pipelines.compress.summary import sum_up

    _, data_id = _data(recipe, resolved["data"]["sha256"])
    return replace(results, compression=sum_up(bench, compressed, data_id, variants, assemble.selection(results)))


def _make(
    shop: Workshop, recipe: Recipe, resolved: dict[str, Any], source: Source
) -> tuple[Bench, Artifacts, list[Judged], Learning]:
    """Run the original, and make every artifact and engine."""
    original = original_of(recipe, source)
    identity = original_key(original)
    planned = candidates(recipe, traceable=source.kind != "onnx")
    data, data_id = _data(recipe, resolved["data"]["sha256"])
    _refuse_bad_data(recipe, source)
    halves = {c.variant.precision for c in planned} & {"fp16", "bf16"}

    def record() -> Made:
        return record_original(shop, recipe, original, identity, data, data_id, halves)

    def program(precision: str) -> Made | PlanishError:
        try:
            return export_program(shop, original, identity, precision)
        except EnvironmentLackError:
            raise
        except PlanishError as error:  # the other targets do without it
            return error

    # The record comes first: there it is noticed what is wrong with points and data.
    asked_for = with_needs(ingredients(planned))
    programs = {name: precision for name, precision in PROGRAMS.items() if name in asked_for}
    works: list[Callable[[], Any]] = [record, lambda: export_onnx(shop, original, identity, recipe.export)]
    works += [partial(program, precision) for precision in programs.values()]
    found: list[Any] = shop.together(works)
    recorded, exported, traced = found[0], found[1], dict(zip(programs, found[2:], strict=True))
    learning = Learning.of(recipe.calibration, recipe.seed, original, identity, *_calibration_data(recipe, resolved))
    artifacts = make_artifacts(
        shop, recorded, exported, traced, planned, recipe.export, learning, recipe.engine.options()
    )
    bench = Bench(shop, recipe, original, recorded, data)
    return bench, artifacts, [locate(c, artifacts) for c in planned], learning


def _data(recipe: Recipe, digest: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """How to open the evaluation data, and what identifies it."""
    asked = recipe.data
    common = {"columns": asked.columns, "limit": asked.limit, "split": asked.split, "seed": recipe.seed}
    return _opened(asked.evaluation, digest, common)


def _calibration_data(recipe: Recipe, resolved: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """How to open the calibration data, and what identifies it. The rows that judge quality are not among them, unless
    the recipe says so: what is measured on rows that ranges were learned from tells too much good."""
    learned = recipe.calibration
    common = {"columns": _calibration_columns(recipe), "limit": None, "split": learned.split, "seed": recipe.seed}
    return _opened(recipe.calibration.data, resolved["calibration"]["sha256"], common)


def _calibration_columns(recipe: Recipe) -> dict[str, Any]:
    """Those of inputs: ranges are learned without labels, which the data may not have."""
    from calibration.roles import TRUTH

    learned = recipe.calibration
    columns = {} if learned.data is None else learned.columns or recipe.data.columns
    return {role: column for role, column in columns.items() if role not in TRUTH}


def _opened(
    path_given: str | None, digest: str | None, common: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    if path_given is None:
        import calibration

        built_in = Path(calibration.__path__[0]) / "data"
        return {"path": None, **common}, {"built-in": path_digest(built_in), **common}
    path = Path(path_given)
    return {"path": str(path), **common}, {"sha256": digest, "format": data_format(path.name), **common}


def _refuse_bad_data(recipe: Recipe, source: Source | None) -> None:
    """Open the user's data once before anything heavy starts: what is wrong with a file is said at once.

    Without `source` its classes are not known yet.

    The roles of a `custom` task are its model's inputs, which nobody knows yet: there the first stage finds out.
    """
    asked, learned = recipe.data, recipe.calibration
    if not get_task(str(recipe.task)).roles:
        return
    from calibration.datasets import load_task_dataset
    from pipelines.postprocess import problem_type
    from pipelines.stages.data import refuse_unknown_labels
    from pipelines.verification.predict import WITHOUT_METRIC

    if learned.data is not None:
        columns = _calibration_columns(recipe)
        load_task_dataset(str(recipe.task), learned.data, columns=columns, split=learned.split)
    if asked.evaluation is None:
        return
    data = load_task_dataset(
        str(recipe.task),
        asked.evaluation,
        columns=asked.columns,
        limit=asked.limit,
        seed=recipe.seed,
        split=asked.split,
    )
    if source is None:
        return
    folder = source.files_folder
    if folder is not None and problem_type(folder) in WITHOUT_METRIC:
        return
    labels = {} if folder is None else read_labels(folder)
    # A model with a single logit has two classes, whatever it names.
    refuse_unknown_labels(data, labels, max(2, 1 + max(labels)) if labels else None)


def _refuse_bad_metric(recipe: Recipe, source: Source) -> None:
    """Look at the metric before anything heavy starts."""
    if recipe.quality.metric is None:
        return
    from pipelines.verification.metrics import check_metric

    labels = {} if source.files_folder is None else read_labels(source.files_folder)
    check_metric(recipe.quality.metric, str(recipe.task), labels)


def named(recipe: Recipe) -> tuple[Recipe, Source]:
    """The recipe with its task and its name, where it leaves them to the source, and the source.

    Raises:
        RequestError: The source is none, or the task is not known or cannot be inferred.
    """
    source = resolve_source(
        recipe.source, revision=recipe.revision, trust=recipe.trust, trust_remote_code=recipe.trust_remote_code
    )
    task = infer_task(source) if recipe.task is None else get_task(recipe.task)
    return recipe.model_copy(update={"task": task.name, "name": recipe.name or source.name}), source


def workshop(cache: Cache, progress: Progress, recipe: Recipe, source: Source) -> Workshop:
    """What the stages of a run of `recipe` share."""
    log = log_folder() / f"{recipe.name or source.name}-{time.strftime('%Y%m%d-%H%M%S')}.log"
    threads = recipe.threads or usable_cores()
    return Workshop(cache, progress, log, threads, lanes_for(source.weights_bytes, threads))


def _write(results: assemble.Results, folder: Path, *, replace: bool) -> Bundle:
    from pipelines.report import render_html, render_json

    selected = assemble.selection(results)
    contents, owned = assemble.bundle_files(results, selected)
    written = assemble.manifest(results, selected, owned)
    contents.update(assemble.evidence(results))
    sizes = {name: len(c) if isinstance(c, bytes) else c.stat().st_size for name, c in contents.items()}
    document = assemble.report(results, written, sizes)
    contents["report.json"] = render_json(document)
    contents["report.html"] = render_html(document).encode("utf-8", errors="replace")
    return write_bundle(contents, written, folder, replace=replace)
