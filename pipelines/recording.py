"""Running the original: the request that opens it, and the stage that records what it says."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.original.plain import original_arguments
from exporter.tasks import get_task
from pipelines.workshop import TORCH, Made, Workshop

if TYPE_CHECKING:
    from exporter.sources import Source
    from pipelines.recipe import Recipe


def original_of(recipe: Recipe, source: Source) -> dict[str, Any]:
    """How a source is opened as an original, as the recipe has it: plain data for other processes."""
    return original_arguments(
        source,
        get_task(str(recipe.task)),
        max_batch=recipe.export.max_batch,
        max_length=recipe.export.max_length,
        attends=recipe.contract.attends,
        custom=None if recipe.custom is None else recipe.custom.model_dump(mode="json"),
    )


def record_original(
    shop: Workshop,
    recipe: Recipe,
    original: dict[str, Any],
    identity: dict[str, Any],
    data: dict[str, Any],
    data_id: dict[str, Any],
    precisions: Collection[str],
    *,
    title: str = "Run the original",
) -> Made:
    """What the original says: parity cases, noise floors, inputs of operating points, predictions on the data.

    Args:
        shop: Runs and keeps stages.
        recipe: How many samples, which points.
        original: See `original_of`.
        identity: What its results depend on, wherever it lies.
        data: How to open the evaluation data.
        data_id: What identifies them.
        precisions: Of half precisions, those whose noise floor is wanted.
        title: What the user reads.
    """
    asked = {
        "samples": recipe.parity.samples,
        "seed": recipe.seed,
        "points": list(recipe.latency.points),
        "points_given": "points" in recipe.latency.model_fields_set,
        "precisions": sorted(precisions),
    }
    made = shop.make(
        "record",
        title,
        "pipelines.stages.record:record",
        {"original": original, "data": data, **asked},
        inputs={"original": identity, "data": data_id, **asked},
        packages=(*TORCH, "onnxruntime", "numpy", "pillow"),
    )
    return _named_now(made, data)


def _named_now(recorded: Made, data: Mapping[str, Any]) -> Made:
    """The record with the name that the data have in this run: an earlier one may have read them under another."""
    if data["path"] is None:
        return recorded
    origin = Path(data["path"], data["split"] or "").name
    return replace(recorded, record={**recorded.record, "data": {**recorded.record["data"], "origin": origin}})
