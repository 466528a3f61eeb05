"""The noise floor: what PyTorch itself gets wrong, measured as the errors of variants are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from exporter.artifact import InputContract
from pipelines.verification.envelope import Case, counting_positions
from pipelines.verification.judgement import Floor, fixed_floor
from pipelines.verification.original_runs import PrecisionRun, fp64_outputs, fp64_run, half_outputs, half_run
from pipelines.verification.parity import compare

if TYPE_CHECKING:
    from torch import nn

__all__ = ["fp32_floor", "fp64_outputs", "half_floor", "half_outputs"]

Array = np.ndarray
BF16_TO_FP16 = 8.0
"""How many times larger BF16's unit roundoff is: it has three bits less."""


def fp32_floor(
    module: nn.Module | None,
    cases: Sequence[Case],
    reference: Callable[[str], Mapping[str, Array]],
    contract: InputContract,
    magnitudes: Mapping[str, float] | None = None,
) -> Floor:
    """FP32's floor: the original's own error against its FP64 run, or the fixed one where there is no such run.

    Args:
        module: The original; ``None`` where it is no PyTorch module.
        cases: Where to measure; a few are enough, the others get the pooled value.
        reference: The original's FP32 outputs by case name.
        contract: Its mask says which positions count, here as in the errors that are judged.
        magnitudes: The usual magnitude of each output (see `Floor`).
    """
    usual = magnitudes or {}

    def fixed(reason: str) -> Floor:
        return fixed_floor(reason, usual)

    if module is None:
        return fixed("the original is no PyTorch module")
    return _measure(fp64_run(module), cases, reference, contract, usual, fixed)


def half_floor(
    module: nn.Module | None,
    cases: Sequence[Case],
    reference: Callable[[str], Mapping[str, Array]],
    contract: InputContract,
    precision: str,
    magnitudes: Mapping[str, float] | None = None,
) -> Floor:
    """Half precision's floor: PyTorch's own half-precision run against the original's FP32 outputs.

    Without such a run the floor is empty, and parity `inconclusive`. Where PyTorch's FP16 run gives NaN or Inf in every
    case, an output's floor is an eighth of the error of its BF16 run: rounding errors of the two are as their unit
    roundoffs, 2^-11 and 2^-8, and BF16 has the range that FP16 lacks.
    """
    usual = magnitudes or {}

    def none(reason: str) -> Floor:
        return Floor(f"PyTorch has no {precision} run of the original ({reason})", magnitudes=usual)

    if module is None:
        return none("it is no PyTorch module")
    floor = _measure(half_run(module, precision), cases, reference, contract, usual, none)
    lost = _lost(floor, reference(cases[0].name)) if precision == "fp16" and floor.errors else []
    if not lost:
        return floor
    wide = _measure(half_run(module, "bf16"), cases, reference, contract, usual, none)
    errors = {
        name: {**found, **{o: wide.errors[name][o] / BF16_TO_FP16 for o in lost if o in wide.errors.get(name, {})}}
        for name, found in floor.errors.items()
    }
    note = f"{floor.note}; of {', '.join(lost)} it is NaN or infinite: an eighth of the error of its bf16 run instead"
    return Floor(note, errors, magnitudes=usual)


def _lost(floor: Floor, outputs: Mapping[str, Array]) -> list[str]:
    """The outputs that have no floor in any case: the run gave NaN or Inf where the original does not."""
    return [name for name in outputs if floor.pooled(name) is None]


def _measure(
    way: PrecisionRun,
    cases: Sequence[Case],
    reference: Callable[[str], Mapping[str, Array]],
    contract: InputContract,
    usual: Mapping[str, float],
    otherwise: Callable[[str], Floor],
) -> Floor:
    """Case by case, so that no more than one case's outputs are held."""
    errors: dict[str, dict[str, float]] = {}
    for case, outputs, reason in way.run(cases):
        if outputs is None:
            return otherwise(reason)
        # What rounding does to the original is measured against the better run, which for half is the original.
        truth, rough = (outputs, reference(case.name)) if way.truer else (reference(case.name), outputs)
        found = compare(truth, rough, valid=counting_positions(case, contract))
        errors[case.name] = {
            name: error.relative_to(usual.get(name, 0.0))
            for name, error in found.items()
            if not error.nonfinite_mismatch
        }
    return Floor(way.note, errors, magnitudes=usual)
