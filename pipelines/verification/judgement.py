"""The parity gate: errors against limits that are multiples of what PyTorch itself does (the noise floor)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from exporter.errors import RequestError
from pipelines.verification.envelope import Case
from pipelines.verification.gates import worst_verdict
from pipelines.verification.parity import OutputError, relative_rms

Array = np.ndarray
CaseErrors = Mapping[str, Mapping[str, OutputError]]


@dataclass(frozen=True)
class Rule:
    """How a precision is judged: RMS relative error <= `multiple` x max(floor, `smallest_floor`).

    `multiple` is ``None`` where errors are reported and only shapes, NaN and Inf are judged.
    """

    multiple: float | None
    smallest_floor: float = 0.0


RULES: dict[str, Rule] = {
    "fp32": Rule(10.0, 1e-7),
    "fp16": Rule(2.0),
    "bf16": Rule(2.0),
    "int8": Rule(None),
    "fp8": Rule(None),
    "int4": Rule(None),
}
FIXED_FLOOR = 2e-7
"""The floor of FP32 where the original has no true FP64 run."""


@dataclass(frozen=True)
class Floor:
    """What PyTorch itself gets wrong, as RMS relative errors.

    Attributes:
        note: How it was measured, or why it could not be and what stands in its place.
        errors: By case and output; cases that were not run are missing.
        fixed: Stands for every output where nothing was measured.
        magnitudes: The usual magnitude of each output (`Magnitudes`), which errors are relative to where a case's own
            is smaller, here as in what is judged by this floor.
    """

    note: str
    errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    fixed: float | None = None
    magnitudes: Mapping[str, float] = field(default_factory=dict)

    def pooled(self, output: str) -> float | None:
        """The root mean square over the cases that were measured, which are equal in weight."""
        values = [case[output] for case in self.errors.values() if output in case and np.isfinite(case[output])]
        return float(np.sqrt(np.mean(np.square(values)))) if values else self.fixed

    def of(self, case: str, output: str) -> float | None:
        """The floor of an output in a case: its own, or the pooled one where that is higher (or the only one).

        A single case can be lucky: on a few numbers the original's rounding errors may cancel.
        """
        pooled = self.pooled(output)
        own = self.errors.get(case, {}).get(output)
        if own is None or not np.isfinite(own):
            return pooled
        return own if pooled is None else max(own, pooled)


def fixed_floor(reason: str, magnitudes: Mapping[str, float] | None = None) -> Floor:
    """FP32's floor where there is no true FP64 run."""
    note = f"no true FP64 run ({reason}): the floor is {FIXED_FLOOR:g}"
    return Floor(note, fixed=FIXED_FLOOR, magnitudes=magnitudes or {})


def judge(
    precision: str,
    errors: CaseErrors,
    floor: Floor | None,
    *,
    shapes: Mapping[str, str] | None = None,
    consistency: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The verdict record of parity, as the report has it: plain data for JSON.

    Args:
        precision: The variant's.
        errors: By case, by output (`compare`).
        floor: What PyTorch itself gets wrong in this precision (FP32: against its FP64 run; half: against FP32). Not
            used for quantized precisions.
        shapes: By case, for the report (``"8x128"``).
        consistency: Records of `compare_alone`.

    Raises:
        RequestError: The precision is not known.
    """
    if precision not in RULES:
        raise RequestError("no parity rule for this precision", precision, f"Known: {', '.join(RULES)}")
    rule = RULES[precision]
    judged = rule.multiple is not None
    usual = {} if floor is None else floor.magnitudes
    reasons: list[str] = []
    cases: list[dict[str, Any]] = []
    ratio = 0.0
    worst_at: tuple[float, float | None, float | None] = (-1.0, None, None)
    for name, outputs in errors.items():
        verdicts = ["passed"]
        for output, error in outputs.items():
            if problem := _broken(error):
                verdicts.append("failed")
                reasons.append(f"{name}, {output}: {problem}")
            limit, base = _limit(rule, floor, name, output)
            if not judged:
                continue
            if limit is None:
                verdicts.append("passed" if error.rms_relative == 0 else "inconclusive")
                continue
            relative = error.relative_to(usual.get(output, 0.0))
            share = relative / limit
            if share > worst_at[0]:
                worst_at = (share, base, limit)
            ratio = max(ratio, share)
            if share > 1 and error.same_shape:
                verdicts.append("failed")
                reasons.append(f"{name}, {output}: RMS relative error {relative:.2e}, limit {limit:.2e}")
        cases.append(
            {
                "name": name,
                "shape": (shapes or {}).get(name, ""),
                "rms_relative": {output: _finite(error.rms_relative) for output, error in outputs.items()},
                "rms_judged": {
                    output: _finite(error.relative_to(usual.get(output, 0.0))) for output, error in outputs.items()
                },
                "verdict": worst_verdict(verdicts),
            }
        )
    checks = [dict(record) | _judge_consistency(record, rule, floor) for record in consistency]
    reasons += [check["reason"] for check in checks if check["verdict"] == "failed"]
    verdict = worst_verdict([case["verdict"] for case in cases] + [check["verdict"] for check in checks])
    if not cases:
        verdict, reasons = "inconclusive", ["nothing was compared"]
    note = floor.note if floor is not None else "errors are not judged in this precision: quality decides"
    if judged and floor is None:
        note = "no floor was given"
    return {
        "verdict": verdict,
        "reason": _sentence(verdict, reasons, judged, worst_at, note),
        "outputs": _by_output(errors, usual),
        "floor": worst_at[1],
        "floor_note": note,
        "limit": worst_at[2],
        "ratio": _finite(ratio) if judged and worst_at[2] is not None else None,
        "cases": cases,
        "consistency": [
            {key: _finite(value) if isinstance(value, float) else value for key, value in check.items()}
            for check in checks
        ],
    }


def compare_alone(
    case: Case,
    original: Mapping[str, Mapping[str, Array]],
    variant: Mapping[str, Mapping[str, Array]],
    magnitudes: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """How much each side changes its mind about a sample between running it alone and in a padded batch.

    Args:
        case: Of kind ``alone``, with its partner.
        original: The original's outputs by case name.
        variant: The variant's.
        magnitudes: The usual magnitude of each output (see `Floor`).

    Returns:
        One record per output: RMS relative difference between the two runs of the original, and of the variant.
    """
    if case.partner is None or case.row is None:
        raise RequestError("this case has no partner to compare with", case.name, "Give one of kind 'alone'")
    usual = magnitudes or {}
    records = []
    for output in original[case.name]:
        own = [
            _inconsistency(side[case.name][output], side[case.partner][output], case.row, usual.get(output, 0.0))
            for side in (original, variant)
            if output in side[case.name] and output in side[case.partner]
        ]
        if len(own) == 2 and None not in own:
            records.append(
                {"case": case.name, "partner": case.partner, "output": output, "original": own[0], "variant": own[1]}
            )
    return records


def _inconsistency(alone: Array, batch: Array, row: int, usual: float) -> float | None:
    """``None`` where the output has no row of its own per sample."""
    if alone.ndim != batch.ndim or alone.ndim == 0 or alone.shape[0] != 1 or batch.shape[0] <= row:
        return None
    inside = batch[row : row + 1]
    # Padding is on the right, so what belongs to the sample comes first on every axis that grew with it.
    inside = inside[tuple(slice(0, size) for size in alone.shape)]
    return relative_rms(alone, inside, usual) if inside.shape == alone.shape else None


def _judge_consistency(record: Mapping[str, Any], rule: Rule, floor: Floor | None) -> dict[str, Any]:
    """The variant may be as inconsistent as the original, plus the limit that parity grants."""
    limits = [_limit(rule, floor, record[name], record["output"])[0] for name in ("case", "partner")]
    if None in limits:
        return {"limit": None, "verdict": "passed", "reason": "reported, not judged"}
    limit = record["original"] + max(limit for limit in limits if limit is not None)
    if record["variant"] <= limit:
        return {"limit": limit, "verdict": "passed", "reason": "within the original's own inconsistency and the limit"}
    reason = (
        f"{record['output']}: a sample alone and in a padded batch differ by {record['variant']:.2e}, "
        f"in the original by {record['original']:.2e}, limit {limit:.2e}"
    )
    return {"limit": limit, "verdict": "failed", "reason": reason}


def _limit(rule: Rule, floor: Floor | None, case: str, output: str) -> tuple[float | None, float | None]:
    base = None if floor is None else floor.of(case, output)
    if rule.multiple is None or base is None:
        return None, None
    base = max(base, rule.smallest_floor)
    return (rule.multiple * base, base) if base > 0 else (None, None)


def _broken(error: OutputError) -> str | None:
    if not error.same_shape:
        shape = error.shape or "no such output"
        return f"shape {shape} where the original has {error.shape_expected}"
    if error.nonfinite_mismatch:
        return f"{error.nonfinite_mismatch} values are NaN or Inf unlike the original's"
    return None


def _by_output(errors: CaseErrors, usual: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """The worst of each figure over the cases; NaN and Inf counts are summed."""
    collected: dict[str, list[OutputError]] = {}
    for outputs in errors.values():
        for output, error in outputs.items():
            collected.setdefault(output, []).append(error)
    return {
        output: {
            "rms_relative": _finite(max(e.rms_relative for e in found)),
            "rms_relative_all": _finite(max(e.rms_relative_all for e in found)),
            "rms_judged": _finite(max(e.relative_to(usual.get(output, 0.0)) for e in found)),
            "max_abs": _finite(max(e.max_abs for e in found)),
            "cosine_min": min(e.cosine_min for e in found),
            "top1_agreement": min((e.top1_agreement for e in found if e.top1_agreement is not None), default=None),
            "nan": sum(e.nan for e in found),
            "inf": sum(e.inf for e in found),
            "nonfinite_mismatch": sum(e.nonfinite_mismatch for e in found),
        }
        for output, found in collected.items()
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity: an error that cannot be measured (another shape, a reference of zeros) is null."""
    return value if np.isfinite(value) else None


def _sentence(
    verdict: str, reasons: list[str], judged: bool, worst_at: tuple[float, float | None, float | None], note: str
) -> str:
    if reasons:
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        return reasons[0] + more
    if verdict == "inconclusive":
        return f"nothing to judge the errors by: {note}"
    if not judged:
        return "shapes, NaN and Inf are the original's; errors are left to quality"
    return f"worst RMS relative error is {worst_at[0]:.2f} of its limit"
