"""Certifying a checkpoint that somebody else compressed: what it really is, and whether it is faster for it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.errors import GateError, RequestError
from pipelines.progress import Progress

if TYPE_CHECKING:
    from exporter.original import Original
    from exporter.sources import Source
    from pipelines.compress.dead import DeadParts

REMOVED = "smaller"


def certify(
    checkpoint: str,
    *,
    task: str | None = None,
    out: Path | str | None = None,
    claims: str | None = None,
    latency: bool = True,
    points: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    budget_s: float = 60.0,
    threads: int | None = None,
    trust: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Say what a checkpoint is.

    Args:
        checkpoint: A Hugging Face folder, ``package:folder`` or hub id.
        task: What the model does (default: inferred).
        out: Where the checkpoint without its dead parts is written; an empty folder or none.
        claims: What is to be true of it, see `pipelines.compress.claims.parse_claims`.
        latency: Time it against its dense twin where there is something to gain.
        points: Operating points of that (default: `pipelines.compress.speed.POINTS`).
        targets: Names of targets of that (default: all that are here).
        budget_s: Seconds to measure for.
        threads: Compute threads (default: all cores).
        trust: Run the checkpoint's own Python code.
        progress: Tells how it goes.

    Returns:
        Plain data: ``weights``, ``sparsity``, ``two_four``, ``low_rank``, ``few_values``, ``identical_layers``,
        ``structure`` (dead heads and neurons), ``removal``, ``latency``, ``claims``, and ``findings``: all of it in
        sentences.

    Raises:
        RequestError: There is no such folder, it is no Hugging Face model, or `out` is taken.
        GateError: `out` was given, and the smaller checkpoint does not give the same outputs.
    """
    from exporter.original import open_original
    from exporter.sources import resolve_source
    from exporter.tasks import get_task, infer_task
    from pipelines.compress import wording
    from pipelines.compress.claims import check_claims, parse_claims

    progress = progress or Progress(quiet=True)
    asked = [] if claims is None else parse_claims(claims)
    place = None if out is None else _free(Path(out))
    _refuse_bad_points(points)
    source = resolve_source(checkpoint, trust_remote_code=trust)
    if not source.is_folder:
        raise RequestError("only a Hugging Face model folder can be certified", checkpoint, f"This is {source.kind}")
    doing = infer_task(source) if task is None else get_task(task)
    with progress.step("Open the checkpoint"):
        original = open_original(source, doing)
    with progress.step("Look at every weight matrix"):
        record = {**_identity(source, original), **_measured(original.module)}
    dead, record["structure"] = _structure(original)
    record["removal"] = record["latency"] = None
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="planish-certify-")))
        forms = {"dense": str(scratch / "dense"), "found": checkpoint}
        if any(parts.removable_heads or parts.removable_neurons for parts in dead):
            with progress.step("Remove what is dead, and compare"):
                record["removal"] = _remove(original, dead, scratch / REMOVED, place)
            if record["removal"]["parity"]["verdict"] == "passed":
                forms[REMOVED] = record["removal"]["folder"] or str(scratch / REMOVED)
        del original
        if latency and wording.worth_measuring(record):
            settings = {"points": points, "targets": targets, "budget_s": budget_s, "threads": threads}
            record["latency"] = _race(source, doing.name, forms, settings, trust, progress)
    record["claims"] = check_claims(asked, record)
    record["findings"] = wording.findings(record)
    removal = record["removal"]
    if place is not None and removal is not None and removal["folder"] is None:
        raise GateError("the smaller checkpoint was not written", place, removal["parity"]["reason"])
    return record


def _refuse_bad_points(points: Sequence[str] | None) -> None:
    from pipelines.recipe_sections import parse_point

    for point in points or ():
        try:
            parse_point(point)
        except ValueError as error:
            raise RequestError("not an operating point", repr(point), "Write batch x length, as 8x128") from error


def _free(out: Path) -> Path:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError("there is something already where the checkpoint is to go", out, "Name a new folder")
    if not out.resolve().parent.is_dir():
        raise RequestError("the folder to write into does not exist", out.resolve().parent, "Make it first")
    return out


def _identity(source: Source, original: Original) -> dict[str, Any]:
    from exporter.sources.weights import stored_dtypes

    parameters = list(original.module.parameters())
    return {
        "checkpoint": source.spec,
        "digest": source.digest,
        "task": original.task.name,
        "model_type": original.module.config.model_type,
        "weights": {
            "parameters": sum(p.numel() for p in parameters),
            "nonzero": sum(int((p != 0).sum()) for p in parameters),
            "stored": source.parameters,
            "bytes": source.weights_bytes,
            "dtypes": stored_dtypes(source.path, source.weights),
        },
    }


def _measured(module: Any) -> dict[str, Any]:
    from pipelines.compress.dead import identical_layers
    from pipelines.compress.weights import MOST_VALUES, RANK_RULE, measure_matrix, weight_matrices

    facts = [measure_matrix(*matrix) for matrix in weight_matrices(module)]
    inner = [fact for fact in facts if fact.in_layers]
    groups = sum(fact.groups for fact in facts)
    low = [
        {"name": f.name, "rank": f.rank, "full_rank": f.full_rank, "saves": max(0, f.elements - f.factored)}
        for f in facts
        if f.low_rank
    ]
    return {
        "sparsity": {
            "overall": _share(facts),
            "in_layers": _share(inner) if inner else None,
            "elements": sum(fact.elements for fact in facts),
            "zeros": sum(fact.zeros for fact in facts),
            "matrices": [{**fact.to_dict(), "in_layers": fact.in_layers} for fact in facts],
        },
        "two_four": {
            "share": sum(fact.conforming for fact in facts) / groups if groups else None,
            "exact": [fact.name for fact in facts if fact.exactly_two_four],
            "matrices": len(facts),
        },
        "low_rank": {"rule": RANK_RULE, "matrices": low},
        "few_values": {
            "most": MOST_VALUES,
            "matrices": [{"name": fact.name, "values": fact.values} for fact in facts if fact.few_values],
        },
        "identical_layers": identical_layers(module),
    }


def _share(facts: Sequence[Any]) -> float:
    elements = sum(fact.elements for fact in facts)
    return sum(fact.zeros for fact in facts) / elements if elements else 0.0


def _structure(original: Original) -> tuple[list[DeadParts], dict[str, Any]]:
    from pipelines.compress.dead import dead_parts

    try:
        dead, reason = dead_parts(original.module), ""
    except RequestError as error:
        dead, reason = [], f"{error.what}: {error.value}"
    return dead, {
        "known": not reason,
        "reason": reason,
        "heads": sum(parts.heads for parts in dead),
        "neurons": sum(parts.neurons for parts in dead),
        "dead_heads": sum(len(parts.dead_heads) for parts in dead),
        "dead_neurons": sum(len(parts.dead_neurons) for parts in dead),
        "removable_heads": sum(len(parts.removable_heads) for parts in dead),
        "removable_neurons": sum(len(parts.removable_neurons) for parts in dead),
        "why_no_heads": next((parts.why_no_heads for parts in dead), ""),
        "layers": [parts.to_dict() for parts in dead],
    }


def _remove(original: Original, dead: Sequence[DeadParts], scratch: Path, place: Path | None) -> dict[str, Any]:
    """Remove, write, read back what was written, and compare that; what is the same goes to `place`."""
    import shutil

    from exporter.original import open_original
    from exporter.sources import resolve_source
    from exporter.structure import save_checkpoint
    from exporter.structure.checkpoint import files_beside
    from pipelines.compress.dead import remove_dead
    from pipelines.compress.sameness import judge_sameness, record_reference

    source, module = original.source, original.module
    before, reference = sum(p.numel() for p in module.parameters()), record_reference(original)
    remove_dead(module, dead)
    save_checkpoint(module, scratch, small_files=files_beside(source))
    written = resolve_source(str(scratch), trust_remote_code=source.trust_remote_code)
    smaller = open_original(written, original.task)
    parity = judge_sameness(reference, smaller)
    after = sum(p.numel() for p in smaller.module.parameters())
    if place is not None and parity["verdict"] == "passed":
        partial = place.resolve().parent / f".{place.name}.partial"
        shutil.copytree(scratch, partial, dirs_exist_ok=True)
        partial.rename(place)
    return {
        "parameters_before": before,
        "parameters_after": after,
        "bytes_before": source.weights_bytes,
        "bytes_after": written.weights_bytes,
        "folder": str(place) if place is not None and parity["verdict"] == "passed" else None,
        "parity": parity,
    }


def _race(
    source: Source, task: str, forms: dict[str, str], settings: dict[str, Any], trust: bool, progress: Progress
) -> dict[str, Any]:
    """The race; a model that cannot be exported, or takes none of the default points, has none and says why."""
    from exporter.original import open_original
    from exporter.structure import save_checkpoint
    from exporter.structure.checkpoint import files_beside
    from exporter.tasks import get_task
    from pipelines.compress.speed import race_forms
    from pipelines.compress.twin import fill_zeros

    with progress.step("Fill the zeros of the dense twin"):
        twin = open_original(source, get_task(task))
        fill_zeros(twin.module)
        save_checkpoint(twin.module, Path(forms["dense"]), small_files=files_beside(source))
        del twin
    try:
        return race_forms(forms, task, **settings, trust=trust, progress=progress)
    except RequestError as error:
        if settings["points"] is not None or settings["targets"] is not None:  # what was asked for may be the trouble
            raise
        return {"skipped_all": str(error), "ratios": {}, "busy_elsewhere": None}
