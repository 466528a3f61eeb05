"""Whether a model that was changed inside still computes the same, judged as FP32 variants are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.original import Original

if TYPE_CHECKING:
    from pipelines.verification.envelope import Case
    from pipelines.verification.judgement import Floor

CASE_ELEMENTS = 4096
FLOOR_ELEMENTS = 1024
"""Input elements up to which a case is run, and up to which it is run in FP64 too."""
SAMPLES = 8
CONSTANT = 1e-6
"""The spread of an output, relative to its largest value, up to which it counts as the same for all inputs."""


@dataclass(frozen=True)
class Reference:
    """What a model computed before it was changed.

    Attributes:
        cases: The inputs: built-in samples of the task, and corners of the shapes that the model accepts.
        outputs: By the case's name.
        floor: The model's own error against its FP64 run.
    """

    cases: Sequence[Case]
    outputs: Mapping[str, Mapping[str, np.ndarray]]
    floor: Floor


def record_reference(original: Original) -> Reference:
    """Run a model over example inputs in FP32, and the smaller of them in FP64."""
    from pipelines.stages.data import open_data
    from pipelines.stages.record import parity_cases, parity_samples
    from pipelines.verification.envelope import counting_positions
    from pipelines.verification.noise_floor import fp32_floor
    from pipelines.verification.parity import Magnitudes

    asked: dict[str, Any] = {"path": None, "columns": {}, "limit": SAMPLES, "split": None, "seed": 0}
    data = open_data(asked, original.task.name, original.signature, original.contract)
    samples = parity_samples(original.task.name, original.encoder, data, SAMPLES, 0)
    every = parity_cases(original, samples, (), 0, original.encoder)
    cases = [case for case in every if _elements(case) <= CASE_ELEMENTS] or every[:1]
    outputs, magnitudes = {}, Magnitudes()
    for case in cases:
        outputs[case.name] = original.run(case.inputs)
        magnitudes.add(outputs[case.name], counting_positions(case, original.contract))
    small = [case for case in cases if _elements(case) <= FLOOR_ELEMENTS] or list(cases[:1])
    floor = fp32_floor(original.module, small, outputs.__getitem__, original.contract, magnitudes.usual())
    return Reference(cases, outputs, floor)


def judge_sameness(reference: Reference, changed: Original) -> dict[str, Any]:
    """Compare a changed model with what it was: ``verdict``, ``reason``, ``rms_relative`` (the worst), ``cases``."""
    from pipelines.verification.envelope import counting_positions
    from pipelines.verification.judgement import judge
    from pipelines.verification.parity import compare

    errors = {
        case.name: compare(
            reference.outputs[case.name], changed.run(case.inputs), valid=counting_positions(case, changed.contract)
        )
        for case in reference.cases
    }
    found = judge("fp32", errors, reference.floor)
    worst = [output["rms_judged"] for output in found["outputs"].values() if output["rms_judged"] is not None]
    verdict, reason = found["verdict"], found["reason"]
    if verdict == "passed" and _constant(reference):
        verdict, reason = "inconclusive", "the outputs are the same whatever the inputs are: that proves nothing"
    if verdict == "passed" and (lost := [name for name, output in found["outputs"].items() if output["nan"]]):
        verdict, reason = "inconclusive", f"{', '.join(lost)} holds NaN before as after: that proves nothing"
    return {
        "verdict": verdict,
        "reason": reason,
        "rms_relative": max(worst, default=None),
        "limit": found["limit"],
        "floor_note": found["floor_note"],
        "cases": len(reference.cases),
    }


def _constant(reference: Reference) -> bool:
    """Whether no output tells one row, or one position, of the examples from another."""
    rows: dict[str, list[np.ndarray]] = {}
    for outputs in reference.outputs.values():
        for name, value in outputs.items():
            rows.setdefault(name, []).append(value.reshape(-1, value.shape[-1]).astype(np.float64))
    for found in rows.values():
        if len({part.shape[-1] for part in found}) > 1:
            return False
        every = np.concatenate(found)
        spread = np.nan_to_num(every.max(axis=0) - every.min(axis=0), nan=np.inf)
        if len(every) < 2 or bool((spread > CONSTANT * np.abs(every).max()).any()):
            return False
    return bool(rows)


def _elements(case: Case) -> int:
    """Pixels do not count: pictures cost what their number does."""
    return max(array.size if array.ndim < 3 else len(array) for array in case.inputs.values())
