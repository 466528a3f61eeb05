"""Certifying a checkpoint that somebody else compressed: what it really is, and whether it is faster for it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exporter.errors import GateError, RequestError
from exporter.original.plain import original_arguments
from pipelines.compress.forms import DENSE, FOUND, SMALLER
from pipelines.compress.placing import free_place, put
from pipelines.progress import Progress


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
    from exporter.sources import resolve_source
    from exporter.tasks import get_task, infer_task
    from pipelines.cache import log_folder
    from pipelines.compress import wording
    from pipelines.compress.claims import check_claims, parse_claims
    from pipelines.compress.speed import race_fields, race_forms
    from pipelines.processes import run_job
    from pipelines.recipe import usable_cores
    from pipelines.workshop import PATIENT

    progress, threads = progress or Progress(quiet=True), threads or usable_cores()
    asked = [] if claims is None else parse_claims(claims)
    place = None if out is None else free_place(Path(out))
    source = resolve_source(checkpoint, trust_remote_code=trust)
    if not source.is_folder:
        remedy = f"This is {source.kind}: name the folder of the checkpoint that it was made from"
        raise RequestError("only a Hugging Face model folder can be certified", checkpoint, remedy)
    doing = infer_task(source) if task is None else get_task(task)
    how = race_fields(doing.name, points, targets, budget_s, threads, trust)
    with tempfile.TemporaryDirectory(prefix="planish-certify-") as scratch:
        with progress.step("Examine the checkpoint"):
            job = run_job(
                "pipelines.compress.examine:examine",
                {"original": original_arguments(source, doing), "folder": scratch, "twin": latency},
                log=log_folder() / f"certify-{source.name}-{time.strftime('%Y%m%d-%H%M%S')}.log",
                env=PATIENT,
                threads=threads,
                on_line=progress.update,
            )
        record = {"checkpoint": checkpoint, "digest": source.digest, "task": doing.name, **job.value, "latency": None}
        removal = record["removal"]
        proven = removal is not None and removal["parity"]["verdict"] == "passed"
        if proven and place is not None:
            put(Path(scratch) / SMALLER, place)
            removal["folder"] = str(place)
        if latency and wording.worth_measuring(record):
            forms = {DENSE: str(Path(scratch) / DENSE), FOUND: checkpoint}
            forms |= {SMALLER: str(Path(scratch) / SMALLER)} if proven else {}
            record["latency"] = race_forms(forms, how, progress)
    record["claims"] = check_claims(asked, record)
    record["findings"] = wording.findings(record)
    if place is not None and removal is None:
        record["findings"].append(f"Nothing can be removed, so nothing was written to {place}.")
    if place is not None and removal is not None and not proven:
        raise GateError("the smaller checkpoint was not written", place, removal["parity"]["reason"])
    return record
