"""Where a quantized form fails its quality gate: one more form, with the fewest layers in FP32 that let it pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from exporter.errors import PlanishError
from pipelines.artifacts import Artifacts
from pipelines.judging import Bench, Judged, gate_settings, locate
from pipelines.quantizing import Base, Learning
from pipelines.workshop import ONNX, Made

SUFFIX = "-kept"
SEARCHED: dict[tuple[str, str], tuple[str | None, ...]] = {
    ("openvino-cpu", "int8"): ("static-smooth", "static"),
    ("onnxruntime-cpu", "int8"): ("dynamic", "dynamic-fused", "dynamic-smooth", "weights"),
    ("onnxruntime-cpu", "int4"): (None,),
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
        judged.runs_here
        and variant.form in SEARCHED.get((variant.target, variant.precision), ())
        and judged.gates["parity"]["verdict"] == "passed"
        and judged.gates["quality"]["verdict"] == "failed"
    )


def _search(bench: Bench, artifacts: Artifacts, judged: Judged, learning: Learning, point: str | None) -> Judged | None:
    candidate, shop = judged.candidate, bench.shop
    variant = candidate.variant
    base, recorded = artifacts.made_from[candidate.ingredient], bench.recorded
    settings = gate_settings(bench.recipe)
    how = {
        "precision": variant.precision,
        "form": variant.form,
        "target": variant.target,
        "scheme": None if base.table is None else variant.target,
        "method": None if base.table is None else learning.method,
        "tables": learning.tables,
        "external_data": bench.recipe.export.external_data,
        "settings": settings,
    }
    timed = None if point is None else recorded.folder / "points" / f"{point}.safetensors"
    try:
        made = shop.make(
            f"search-{variant.id}",
            f"Search what to keep of {variant.id}",
            "pipelines.stages.search:search_kept",
            {
                "artifact": base.artifact.to_dict(),
                "table": base.table_path,
                "recorded": str(recorded.folder),
                "evaluation": bench.data,
                "point": None if timed is None else str(timed),
                "threads": shop.threads,
                **how,
                **learning.arguments,
            },
            inputs={
                "artifact": base.id,
                "table": base.table_id,
                "recorded": recorded.id,
                "point": point,
                "learning": learning.identity,
                **how,
            },
            packages=(*ONNX, "openvino"),
            bound_to_machine=True,
        )
    except PlanishError as error:
        if error.exit_status in (3, 130):
            raise
        shop.progress.say(f"{variant.id}: no search: {error}")
        return None
    return _put(artifacts, judged, made, base)


def _put(artifacts: Artifacts, judged: Judged, made: Made, base: Base) -> Judged | None:
    """The form that was found; ``None`` where the gate passes with nothing kept after all, or no layer can be kept."""
    if not made.record["record"]["search"]["kept"]:
        artifacts.precision[judged.candidate.ingredient]["search"] = made.record["record"]["search"]
        return None
    candidate = judged.candidate
    ingredient = candidate.ingredient + SUFFIX
    artifacts.put(ingredient, made, made.record["path"], base.artifact)
    artifacts.precision[ingredient] = base.recorded(made.record["record"])
    variant = replace(candidate.variant, form=f"{candidate.variant.form or ''}{SUFFIX}".lstrip("-"))
    return locate(replace(candidate, variant=variant, ingredient=ingredient), artifacts)
