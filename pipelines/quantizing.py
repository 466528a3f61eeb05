"""Making a run's int8, int4 and FP8 artifacts: one calibration, and from it the forms that the targets take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifact import Artifact
from exporter.errors import NotApplicableError
from pipelines.plan import PORTABLE_FILES
from pipelines.workshop import ONNX, TORCH, Made, Workshop

if TYPE_CHECKING:
    from pipelines.artifacts import Artifacts
    from pipelines.recipe_sections import Calibration

FP8 = "onnx-fp8"
PREFIXES = ("onnx-int8-", "pt2-int8-", "onnx-int4", FP8)
WEIGHTS = {"onnx-int8-weights": "int8", "onnx-int4": "int4"}
"""The ingredients of which the weights alone are quantized, and their precision."""
SCHEMES = {"openvino": "openvino-cpu", "tensorrt": "tensorrt", "fp8": "tensorrt-fp8"}
"""By the end of an ingredient's name, the scheme of its Q/DQ pairs (`calibration.quantize.qdq.SCHEMES`)."""
DEFAULT_FILE = "model_int8.onnx"


@dataclass(frozen=True)
class Learning:
    """What calibration learns from.

    Attributes:
        original: The arguments that open the original: its pre-processing makes the batches.
        data: How to open the calibration data.
        identity: What identifies both, and how many rows are drawn by which seed.
        settings: ``samples`` and ``seed``.
        method: How ranges are chosen; ``None`` takes what suits each target.
        alpha: The strength of smoothing; ``None`` takes for each group of products what promises the least error.
        tables: Whether embedding tables are stored as int8 where the target takes them so.
    """

    original: dict[str, Any]
    data: dict[str, Any]
    identity: dict[str, Any]
    settings: dict[str, Any]
    method: str | None
    alpha: float | None
    tables: bool

    @classmethod
    def of(
        cls,
        asked: Calibration,
        seed: int,
        original: dict[str, Any],
        original_id: Mapping[str, Any],
        data: dict[str, Any],
        data_id: Mapping[str, Any],
    ) -> Learning:
        settings = {"samples": asked.samples, "seed": seed}
        identity = {"original": dict(original_id), "data": dict(data_id), **settings}
        return cls(original, data, identity, settings, asked.method, asked.smooth_alpha, asked.tables)

    @property
    def arguments(self) -> dict[str, Any]:
        return {"original": self.original, "data": self.data, **self.settings}


@dataclass(frozen=True)
class Base:
    """The FP32 graph that a quantized one was made from.

    Attributes:
        artifact: The graph: smoothed, where the form is.
        id: Its identity, for the stages that read it.
        table: The stage that took its ranges; ``None`` where the form needs none.
        smoothing: The record of smoothing it; ``None`` where the form is a plain one.
    """

    artifact: Artifact
    id: str
    table: Made | None = None
    smoothing: dict[str, Any] | None = None

    @property
    def table_path(self) -> str | None:
        return None if self.table is None else str(self.table.folder / self.table.record["path"])

    @property
    def table_id(self) -> str | None:
        return None if self.table is None else self.table.id

    def recorded(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record of a form that was made from it."""
        return record if self.smoothing is None else {**record, "smoothing": self.smoothing}


def needs(ingredient: str) -> str | None:
    """The FP32 ingredient that a quantized one is made from; ``None`` where it is no quantized one."""
    if not ingredient.startswith(PREFIXES):
        return None
    if ingredient.startswith("pt2-"):
        return "pt2-fp32"
    return "onnx-fp32-fused" if ingredient.endswith("-fused") else "onnx-fp32"


def quantize(shop: Workshop, artifacts: Artifacts, ingredient: str, learning: Learning, external_data: str) -> None:
    """Make one quantized ingredient from what is ready.

    Raises:
        PlanishError: It cannot be made.
    """
    base_name = str(needs(ingredient))
    base = Base(artifacts.ready[base_name], artifacts.ids[base_name])
    if ingredient.startswith("pt2-"):
        _program(shop, artifacts, ingredient, base.artifact, base.id, learning)
        return
    dynamic = ingredient.startswith("onnx-int8-dynamic")
    if "-smooth" in ingredient:
        base = _smooth(shop, artifacts, base, learning, external_data)
        if dynamic and base.smoothing is not None and not base.smoothing["groups"]:  # the plain form beside it again
            kept = base.smoothing["kept"]
            why = f"{kept[0]['node']}: {kept[0]['why']}" if kept else "it has no matrix product with constant weights"
            raise NotApplicableError("nothing in the graph is worth smoothing", why, "Leave this form out")
    name = ingredient.removeprefix("onnx-")
    beside: dict[str, Any] = {"tables": learning.tables, "external_data": external_data}
    if ingredient in WEIGHTS:
        how: dict[str, Any] = {"precision": WEIGHTS[ingredient], "external_data": external_data}
        made = shop.make(
            name,
            f"Quantize for ONNX Runtime ({how['precision']} weights)",
            "pipelines.stages.quantize:weight_only",
            {"artifact": base.artifact.to_dict(), **how},
            inputs={"artifact": base.id, **how},
            packages=ONNX,
        )
    elif dynamic:
        made = shop.make(
            name,
            f"Quantize for ONNX Runtime ({name.removeprefix('int8-')})",
            "pipelines.stages.quantize:dynamic",
            {"artifact": base.artifact.to_dict(), **beside},
            inputs={"artifact": base.id, **beside},
            packages=ONNX,
        )
    else:
        base = replace(base, table=_table(shop, artifacts, base, learning))
        precision, _, form = name.partition("-")
        form, _, suited = form.rpartition("-")
        place = Path(PORTABLE_FILES.get(ingredient, DEFAULT_FILE)).name
        how = {"scheme": SCHEMES[suited or precision], "method": learning.method, "name": place, **beside}
        made = shop.make(
            name,
            f"Quantize for {suited or 'tensorrt'} ({form or precision})",
            "pipelines.stages.quantize:static",
            {"artifact": base.artifact.to_dict(), "table": base.table_path, **how},
            inputs={"artifact": base.id, "table": base.table_id, **how},
            packages=ONNX,
        )
    artifacts.put(ingredient, made, made.record["path"], base.artifact)
    artifacts.made_from[ingredient] = base
    artifacts.precision[ingredient] = base.recorded(made.record["record"])


def _smooth(shop: Workshop, artifacts: Artifacts, base: Base, learning: Learning, external_data: str) -> Base:
    """The FP32 graph with its activations smoothed; as it is, where nothing is worth it."""
    learned = replace(base, table=_table(shop, artifacts, base, learning))
    how = {"alpha": learning.alpha, "external_data": external_data}
    made = shop.make(
        "smooth",
        "Smooth activations",
        "pipelines.stages.quantize:smooth",
        {"artifact": base.artifact.to_dict(), "table": learned.table_path, **learning.arguments, **how},
        inputs={"artifact": base.id, "table": learned.table_id, **how},
        packages=ONNX,
    )
    smoothing, path = made.record["record"], made.record["path"]
    if path is None:
        return replace(base, smoothing=smoothing)
    return Base(replace(base.artifact, path=made.folder / path), made.id, smoothing=smoothing)


def learn(
    shop: Workshop, name: str, title: str, function: str, base: Artifact, base_id: str, learning: Learning
) -> Made:
    """A stage that runs an FP32 graph over the calibration data (name, title and function as in `Workshop.make`)."""
    return shop.make(
        name,
        title,
        function,
        {"artifact": base.to_dict(), "threads": shop.threads, **learning.arguments},
        inputs={"artifact": base_id, **learning.identity},
        packages=(*ONNX, "tokenizers", "pillow"),
        bound_to_machine=True,
    )


def _table(shop: Workshop, artifacts: Artifacts, base: Base, learning: Learning) -> Made:
    function = "pipelines.stages.quantize:calibrate"
    title = "Calibrate" if base.smoothing is None else "Calibrate, smoothed"
    made = learn(shop, "calibrate", title, function, base.artifact, base.id, learning)
    if artifacts.calibration is None:  # the graph that comes first is the plain one
        artifacts.calibration = made
    return made


def _program(
    shop: Workshop, artifacts: Artifacts, ingredient: str, base: Artifact, base_id: str, learning: Learning
) -> None:
    form = ingredient.removeprefix("pt2-int8-")
    static = form != "dynamic"
    how = {"form": form, "alpha": learning.alpha if "smooth" in form else None}
    made = shop.make(
        ingredient,
        f"Quantize for AOTInductor ({form})",
        "pipelines.stages.quantize:program",
        {"artifact": base.to_dict(), **how, **learning.arguments},
        inputs={"artifact": base_id, **how, **(learning.identity if static else {})},
        packages=(*TORCH, "torchao"),
        bound_to_machine=static,
    )
    artifacts.put(ingredient, made, made.record["path"], base)
    artifacts.made_from[ingredient] = Base(base, base_id)
    artifacts.precision[ingredient] = made.record["record"]
