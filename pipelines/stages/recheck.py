"""Checking a bundle again from what it carries: jobs that need nothing but its folder (and, if asked, the source)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.bundle import read_bundle
from pipelines.opening import open_variant
from pipelines.processes import report_progress
from pipelines.stages import files
from pipelines.stages.check import as_asked, check_parity, judge_predictions
from pipelines.stages.data import BATCH_SIZE

if TYPE_CHECKING:
    from exporter.targets.base import Session
    from pipelines.bundle import Bundle

GOLDEN = Path("evidence/golden")


def variant_again(arguments: dict[str, Any]) -> dict[str, Any]:
    """Open one variant of a bundle and judge it by the bundle's golden samples.

    Args:
        arguments: ``bundle`` (folder), ``opening``, ``precision``, ``threads``.

    Returns:
        ``executed``, ``parity``, ``quality``.
    """
    from exporter.tasks import get_task

    bundle = read_bundle(Path(arguments["bundle"]))
    golden = bundle.path / GOLDEN
    report_progress("opening")
    session = open_variant(arguments["opening"], threads=int(arguments["threads"]))
    report_progress("parity")
    logits = get_task(bundle.manifest.task).logits
    executed = session.executed()
    parity = check_parity(session, golden / "cases", golden, arguments["precision"], logits)
    result = {"executed": executed, "parity": as_asked(parity, executed, arguments["precision"])}
    report_progress("quality")
    result["quality"] = _quality(session, bundle, golden / "quality")
    session.close()
    return result


def source_again(arguments: dict[str, Any]) -> dict[str, Any]:
    """Run the source over the golden cases and compare with the outputs that the bundle carries.

    Args:
        arguments: ``bundle``, ``original`` (what to open).

    Returns:
        ``parity``: the record of the FP32 gate.
    """
    from exporter.original import open_described
    from pipelines.verification.envelope import counting_positions
    from pipelines.verification.judgement import judge
    from pipelines.verification.parity import compare

    golden = Path(arguments["bundle"]) / GOLDEN
    original = open_described(arguments["original"])
    errors, shapes = {}, {}
    for case, expected in files.read_cases(golden / "cases"):
        valid = counting_positions(case, original.contract)
        errors[case.name] = compare(expected, original.run(case.inputs), valid=valid)
        shapes[case.name] = case.shape(original.signature)
    return {"parity": judge("fp32", errors, files.read_floors(golden).get("fp32"), shapes=shapes)}


def _quality(session: Session, bundle: Bundle, folder: Path) -> dict[str, Any]:
    from exporter.preprocess import load_encoder, read_labels
    from exporter.tasks import get_task
    from pipelines.postprocess import problem_type
    from pipelines.verification.encode import EncodedBatch, encode_rows
    from pipelines.verification.predict import run_predictions

    task, recipe = bundle.manifest.task, bundle.manifest.recipe
    told = json.loads((bundle.path / "evidence/quality.json").read_text(encoding="utf-8"))
    kept: list[Any] | None = files.read_rows(folder)
    labelled = bool(told["data"]["labelled"]) and kept is not None
    if (folder / files.BATCHES).is_file():
        stored = files.read_batches(folder)
        batches = [EncodedBatch(indices, inputs, [{}] * len(indices)) for indices, inputs in stored]
        rows = kept or [{}] * sum(len(indices) for indices, _ in stored)
    else:
        rows = kept or []
        encoder = load_encoder(bundle.path, get_task(task), bundle.signature)
        batches = encode_rows(task, encoder, rows, batch_size=BATCH_SIZE, seed=int(recipe["seed"]))
    labels = read_labels(bundle.path)
    theirs = files.read_predictions(folder / files.PREDICTIONS)
    mine = run_predictions(task, batches, session.run)
    settings = recipe["quality"]
    seed, problem = int(recipe["seed"]), problem_type(bundle.path)
    return judge_predictions(
        task, theirs, mine, rows, batches, labelled, labels, settings, seed, problem=problem, again=True
    )
