"""Stage: how good every model on the way is, each beside the teacher on the same rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.artifact import InputContract, Signature
from pipelines.stages import files
from pipelines.stages.data import BATCH_SIZE, open_data, open_encoder, open_labels, open_problem


def compare(arguments: dict[str, Any]) -> dict[str, Any]:
    """Compare predictions with the teacher's.

    Args:
        arguments: ``teacher`` and ``others`` (by name): folders that hold predictions; ``original`` of the exported
            model, ``signature``, ``contract``, ``data``, ``settings`` (of quality, with the budget against the
            teacher), ``seed``.

    Returns:
        By name of the others, the quality record with the teacher as its original; of the teacher itself its value and
        interval. Where the data have no labels, or the task no metric, records of agreement with the teacher.
    """
    from pipelines.stages.check import judge_predictions
    from pipelines.verification.encode import encode_rows

    original, settings, seed = arguments["original"], arguments["settings"], int(arguments["seed"])
    task, contract = original["task"], InputContract.from_dict(arguments["contract"])
    signature = Signature.from_dict(arguments["signature"])
    data = open_data(arguments["data"], task, signature, contract)
    rows = list(data)
    batches = encode_rows(task, open_encoder(original, signature), rows, batch_size=BATCH_SIZE, seed=seed)
    labels, problem = open_labels(original), open_problem(original)
    teacher = files.read_predictions(Path(arguments["teacher"]) / files.PREDICTIONS)

    def judge(folder: str) -> Mapping[str, Any]:
        theirs = files.read_predictions(Path(folder) / files.PREDICTIONS)
        return judge_predictions(
            task, teacher, theirs, rows, batches, data.labelled, labels, settings, seed, problem=problem, exact=True
        )

    found = {name: dict(judge(folder)) for name, folder in arguments["others"].items()}
    return {"labelled": data.labelled, "rows": len(rows), "models": found}
