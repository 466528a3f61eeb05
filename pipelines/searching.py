"""Where a quantized form fails its quality gate: one more form, with the fewest layers in FP32 that let it pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from exporter.errors import PlanishError
from exporter.targets.onnxruntime import LITERAL
from pipelines.artifacts import Artifacts, try_engine
from pipelines.judging import CPU_RUNNER, Bench, Judged, gate_settings, locate
from pipelines.plan import PORTABLE_FILES
from pipelines.quantizing import SCHEMES, Base, Learning
from pipelines.workshop import ONNX, TORCH, Made

SUFFIX = "-kept"
SEARCHED: dict[tuple[str, str], tuple[str | None, ...]] = {
    ("openvino-cpu", "int8"): ("static-smooth", "static"),
    ("onnxruntime-cpu", "int8"): ("dynamic", "dynamic-fused", "dynamic-smooth", "weights"),
    ("onnxruntime-cpu", "int4"): (None,),
    ("inductor-cpu", "int8"): ("static-smooth", "static", "dynamic"),
    ("tensorrt", "int8"): ("static-smooth", "static"),
    ("tensorrt-rtx", "int8"): ("static-smooth", "static"),
}
"""By target and precision, the forms whose layers can be kept one by one."""


def kept_forms(
    bench: Bench, artifacts: Artifacts, variants: Sequence[Judged], learning: Learning, point: str | None
) -> list[Judged]:
    """The variants, each that failed its quality gate followed by the form that a search found for it, judged.

    Args:
        bench: Judges.
        artifacts: What was made; the forms found are put there.
        variants: Judged already.
        learning: What calibration learned from.
        point: The operating point whose inputs layers are timed with; ``None`` where there is none.
    """
    failed = [judged for judged in variants if _is_searched(judged)]
    # One after the other: they time layers.
    found = [_search(bench, artifacts, judged, learning, point) for judged in failed]
    bench.check_all([judged for judged in found if judged is not None], artifacts)
    after = dict(zip(map(id, failed), found, strict=True))
    return [one for judged in variants for one in (judged, after.get(id(judged))) if one is not None]


def _is_searched(judged: Judged) -> bool:
    variant = judged.candidate.variant
    return (
        judged.artifact is not None  # where its target is not here, its numbers were judged if there is one
        and variant.form in SEARCHED.get((variant.target, variant.precision), ())
        and judged.gates["parity"]["verdict"] == "passed"
        and judged.gates["quality"]["verdict"] == "failed"
    )


def _search(bench: Bench, artifacts: Artifacts, judged: Judged, learning: Learning, point: str | None) -> Judged | None:
    candidate, shop = judged.candidate, bench.shop
    variant = candidate.variant
    base, recorded = artifacts.made_from[candidate.ingredient], bench.recorded
    how, packages = _how(judged, base, learning, bench.recipe.export.external_data)
    how["settings"] = gate_settings(bench.recipe)
    # An emulation's time, or that of a program which is not compiled, says nothing of the target's.
    timed = point if variant.target in ("onnxruntime-cpu", "openvino-cpu") else None
    inputs = None if timed is None else str(recorded.folder / "points" / f"{timed}.safetensors")
    module = "search_program" if base.artifact.format == "pt2" else "search"
    try:
        made = shop.make(
            f"search-{candidate.ingredient}",  # what several targets take is searched once
            f"Search what to keep of {variant.id}",
            f"pipelines.stages.{module}:search_kept",
            {
                "artifact": base.artifact.to_dict(),
                "table": base.table_path,
                "recorded": str(recorded.folder),
                "evaluation": bench.data,
                "point": inputs,
                "threads": shop.threads,
                **how,
                **learning.arguments,
            },
            inputs={
                "artifact": base.id,
                "table": base.table_id,
                "recorded": recorded.id,
                "point": timed,
                "learning": learning.identity,
                **how,
            },
            packages=packages,
            bound_to_machine=True,
        )
    except PlanishError as error:
        if error.exit_status in (3, 130):
            raise
        shop.progress.say(f"{variant.id}: no search: {error}")
        return None
    return _put(bench, artifacts, judged, made, base)


def _how(judged: Judged, base: Base, learning: Learning, external_data: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """How forms are made and opened in a search, and the packages that it depends on."""
    from pipelines.stages.quantize import FILES, PROGRAM

    candidate, variant = judged.candidate, judged.candidate.variant
    how: dict[str, Any] = {"precision": variant.precision, "form": variant.form}
    if base.artifact.format == "pt2":
        alpha = learning.alpha if "smooth" in str(variant.form) else None
        return {**how, "name": PROGRAM, "alpha": alpha}, (*TORCH, "torchao", "numpy")
    place = PORTABLE_FILES.get(candidate.ingredient + SUFFIX, FILES[variant.precision])
    return {
        **how,
        "runner": [CPU_RUNNER, LITERAL] if candidate.skip else [variant.target, variant.form],
        "name": Path(place).name,  # a graph names the file of its weights: no name can be changed later
        "scheme": None if base.table is None else SCHEMES[candidate.ingredient.rpartition("-")[2]],
        "method": None if base.table is None else learning.method,
        "tables": learning.tables,
        "external_data": external_data,
    }, (*ONNX, "openvino")


def _put(bench: Bench, artifacts: Artifacts, judged: Judged, made: Made, base: Base) -> Judged | None:
    """The form that was found; ``None`` where the gate passes with nothing kept after all, or no layer can be kept."""
    if not made.record["record"]["search"]["kept"]:
        artifacts.precision[judged.candidate.ingredient]["search"] = made.record["record"]["search"]
        return None
    candidate = judged.candidate
    ingredient = candidate.ingredient + SUFFIX
    artifacts.put(ingredient, made, made.record["path"], base.artifact)
    artifacts.precision[ingredient] = base.recorded(made.record["record"])
    variant = replace(candidate.variant, form=f"{candidate.variant.form or ''}{SUFFIX}".lstrip("-"))
    kept = replace(candidate, variant=variant, ingredient=ingredient)
    if base.artifact.format == "pt2":
        try_engine(bench.shop, artifacts, kept)
    return locate(kept, artifacts)
