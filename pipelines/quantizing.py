"""Making a run's int8 artifacts: one calibration, and from it the forms that the targets take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from exporter.artifact import Artifact
from pipelines.workshop import ONNX, TORCH, Made, Workshop

if TYPE_CHECKING:
    from pipelines.artifacts import Artifacts
    from pipelines.recipe_sections import Calibration

PREFIXES = ("onnx-int8-", "pt2-int8-")


@dataclass(frozen=True)
class Learning:
    """What calibration learns from.

    Attributes:
        original: The arguments that open the original: its pre-processing makes the batches.
        data: How to open the calibration data.
        identity: What identifies both, and how many rows are drawn by which seed.
        settings: ``samples`` and ``seed``.
        method: How ranges are chosen; ``None`` takes what suits each target.
    """

    original: dict[str, Any]
    data: dict[str, Any]
    identity: dict[str, Any]
    settings: dict[str, Any]
    method: str | None

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
        return cls(original, data, identity, settings, asked.method)

    @property
    def arguments(self) -> dict[str, Any]:
        return {"original": self.original, "data": self.data, **self.settings}


def needs(ingredient: str) -> str | None:
    """The FP32 ingredient that an int8 one is made from; ``None`` where it is no int8 one."""
    if not ingredient.startswith(PREFIXES):
        return None
    if ingredient.startswith("pt2-"):
        return "pt2-fp32"
    return "onnx-fp32-fused" if ingredient.endswith("-fused") else "onnx-fp32"


def quantize(shop: Workshop, artifacts: Artifacts, ingredient: str, learning: Learning, external_data: str) -> None:
    """Make one int8 ingredient from what is ready.

    Raises:
        PlanishError: It cannot be made.
    """
    base_name = str(needs(ingredient))
    base, base_id = artifacts.ready[base_name], artifacts.ids[base_name]
    if ingredient.startswith("pt2-"):
        _program(shop, artifacts, ingredient, base, base_id, learning)
        return
    beside = {"external_data": external_data}
    smoothed = None
    if "-smooth" in ingredient:
        smoothed = _smooth(shop, artifacts, base, base_id, learning, external_data)
        base = replace(base, path=smoothed.folder / smoothed.record["path"])
        base_id = smoothed.id
    if ingredient.startswith("onnx-int8-dynamic"):
        made = shop.make(
            ingredient.removeprefix("onnx-"),
            f"Quantize for ONNX Runtime ({ingredient.removeprefix('onnx-int8-')})",
            "pipelines.stages.quantize:dynamic",
            {"artifact": base.to_dict(), **beside},
            inputs={"artifact": base_id, **beside},
            packages=ONNX,
        )
    else:
        table = _table(shop, artifacts, base, base_id, learning)
        target = "openvino-cpu"
        how = {"target": target, "method": learning.method, **beside}
        made = shop.make(
            ingredient.removeprefix("onnx-"),
            f"Quantize for {target}",
            "pipelines.stages.quantize:static",
            {"artifact": base.to_dict(), "table": str(table.folder / table.record["path"]), **how},
            inputs={"artifact": base_id, "table": table.id, **how},
            packages=ONNX,
        )
    artifacts.put(ingredient, made, made.record["path"], base)
    artifacts.precision[ingredient] = made.record["record"]
    if smoothed is not None:
        artifacts.precision[ingredient] = {**made.record["record"], "smoothing": smoothed.record["record"]}


def _smooth(
    shop: Workshop, artifacts: Artifacts, base: Artifact, base_id: str, learning: Learning, external_data: str
) -> Made:
    """The FP32 graph with its activations smoothed."""
    table = _table(shop, artifacts, base, base_id, learning)
    how = {"alpha": None, "external_data": external_data}
    return shop.make(
        "smooth",
        "Smooth activations",
        "pipelines.stages.quantize:smooth",
        {"artifact": base.to_dict(), "table": str(table.folder / table.record["path"]), **learning.arguments, **how},
        inputs={"artifact": base_id, "table": table.id, **how},
        packages=ONNX,
    )


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


def _table(shop: Workshop, artifacts: Artifacts, base: Artifact, base_id: str, learning: Learning) -> Made:
    made = learn(shop, "calibrate", "Calibrate", "pipelines.stages.quantize:calibrate", base, base_id, learning)
    if artifacts.calibration is None:  # the graph that comes first is the plain one
        artifacts.calibration = made
    return made


def _program(
    shop: Workshop, artifacts: Artifacts, ingredient: str, base: Artifact, base_id: str, learning: Learning
) -> None:
    form = ingredient.removeprefix("pt2-int8-")
    static = form != "dynamic"
    made = shop.make(
        ingredient,
        f"Quantize for AOTInductor ({form})",
        "pipelines.stages.quantize:program",
        {"artifact": base.to_dict(), "form": form, **learning.arguments},
        inputs={"artifact": base_id, "form": form, **(learning.identity if static else {})},
        packages=(*TORCH, "torchao"),
        bound_to_machine=static,
    )
    artifacts.ready[ingredient] = Artifact(made.folder / made.record["path"], "pt2", base.signature, base.contract)
    artifacts.ids[ingredient] = made.id
    artifacts.precision[ingredient] = made.record["record"]
