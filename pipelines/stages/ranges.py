"""Stage: magnitudes of every float tensor, by which half forms decide what stays in FP32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exporter.artifact import Artifact
from exporter.errors import RequestError
from pipelines.processes import report_progress
from pipelines.stages.data import open_data
from pipelines.stages.quantize import batches

RANGES = "ranges.json"
MOST_ROWS = 64
"""Rows measured at most, spread over the lengths and contents of the data: a maximum over more of them seldom grows by
more than the margin grants, and every run that makes a half form waits for it."""


def measure(arguments: dict[str, Any]) -> dict[str, Any]:
    """Measure the float tensors of an FP32 graph over calibration data.

    Data that cannot be opened are no reason to make no half form: the operators then decide alone. Neither are
    tensors that Planish generated, which a model may answer with NaN.

    Args:
        arguments: ``artifact`` (the FP32 graph), ``original``, ``data``, ``samples`` (rows at most), ``seed``,
            ``threads``, ``folder``.

    Returns:
        ``path`` of the ranges relative to the folder (null: none), and ``record``: rows, batches and tensors measured,
        where the data are from, notes, or ``why`` nothing was measured.

    Raises:
        RequestError: An output of the model is NaN or infinite for one of the user's rows.
    """
    from calibration.half_ranges import collect_half_ranges

    artifact, folder = Artifact.from_dict(arguments["artifact"]), Path(arguments["folder"])
    report_progress("measuring activations")
    try:
        rows = open_data(arguments["data"], arguments["original"]["task"], artifact.signature, artifact.contract)
        drawn = batches({**arguments, "samples": min(int(arguments["samples"]), MOST_ROWS)}, rows)
    except RequestError as error:
        return _nothing(f"the calibration data cannot be opened: {error}")
    try:
        found = collect_half_ranges(artifact.path, drawn(), threads=int(arguments["threads"]))
    except RequestError as error:
        if arguments["data"]["path"] is not None:
            raise
        return _nothing(str(error))
    found.save(folder / RANGES)
    record = {"samples": found.samples, "batches": found.batches, "tensors": len(found.ranges), "origin": rows.origin}
    return {"path": RANGES, "record": {**record, "notes": list(found.notes)}}


def _nothing(why: str) -> dict[str, Any]:
    return {"path": None, "record": {"samples": 0, "batches": 0, "tensors": 0, "why": why, "notes": []}}
