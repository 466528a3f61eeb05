"""What a run will do: the variants that the recipe asks for, what each is made from, and which cannot run here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exporter.artifact import Signature, Variant
from exporter.errors import EnvironmentLackError, RequestError

if TYPE_CHECKING:
    from pipelines.recipe import Recipe

PROGRAM = "pt2-fp32"
PROGRAMS = {PROGRAM: "fp32", "pt2-fp16": "fp16", "pt2-bf16": "bf16"}
"""The precisions that a program is traced in, by ingredient."""
PORTABLE_FILES = {
    "onnx-fp32": "onnx/model.onnx",
    "onnx-fp16": "onnx/model_fp16.onnx",
    "onnx-bf16": "onnx/model_bf16.onnx",
    "onnx-int8-dynamic": "onnx/model_int8.onnx",
    "onnx-int8-static-smooth-tensorrt": "onnx/model_int8_tensorrt.onnx",
    "onnx-int8-static-tensorrt": "onnx/model_int8_tensorrt_plain.onnx",
    "onnx-int8-static-smooth-tensorrt-kept": "onnx/model_int8_tensorrt_kept.onnx",
    "onnx-int8-static-tensorrt-kept": "onnx/model_int8_tensorrt_plain_kept.onnx",
    "onnx-fp8": "onnx/model_fp8.onnx",
}
"""Where a portable artifact lies in the bundle: where there is one, the name that transformers.js and
sentence-transformers know."""


@dataclass(frozen=True)
class Candidate:
    """A variant that the recipe asks for.

    Attributes:
        variant: Which.
        ingredient: The export that it is made from (`Target.ingredient`).
        portable: What it opens runs wherever its runtime does.
        skip: Why it cannot run here; empty when it can.
        remedy: The command or step that would enable it.
        ahead: Its engine is built here though it cannot run here.
    """

    variant: Variant
    ingredient: str
    portable: bool
    skip: str = ""
    remedy: str = ""
    ahead: bool = False


def refuse_unoffered(recipe: Recipe) -> None:
    """Refuse a precision that none of the recipe's targets offers: nothing would be made of it, and nothing said.

    The default precisions are those of all targets together, so of those one is enough.

    Raises:
        RequestError: Lists what the targets offer.
    """
    from exporter.artifact import PRECISIONS
    from exporter.targets import get_target, targets

    if recipe.engine.gpus:
        _refuse_gpus(recipe)
    offered = {p for name in recipe.targets for p in get_target(name).precisions}
    missing = [p for p in recipe.precisions if p not in offered]
    if not missing or ("precisions" not in recipe.model_fields_set and len(missing) < len(recipe.precisions)):
        return
    others = [name for name, target in targets().items() if set(missing) <= set(target.precisions)]
    raise RequestError(
        "no target of the recipe offers a precision that it asks for",
        ", ".join(missing),
        f"They offer {', '.join(p for p in PRECISIONS if p in offered)}"
        + (f"; add a target that offers it: {', '.join(others)}" if others else ""),
    )


def _refuse_gpus(recipe: Recipe) -> None:
    """Refuse GPUs to build for that nothing would be built for."""
    from exporter.targets.tensorrt import RTX_GPUS, TensorRtRtx

    named = f"engine.gpus: {', '.join(recipe.engine.gpus)}"
    if "tensorrt-rtx" not in recipe.targets:
        raise RequestError("GPUs are named, and no target builds for them", named, "Add tensorrt-rtx to the targets")
    if unknown := [gpu for gpu in recipe.engine.gpus if gpu not in RTX_GPUS]:
        told = f"engine.gpus: {', '.join(unknown)}"
        raise RequestError("TensorRT for RTX does not build for a GPU", told, f"It builds for {', '.join(RTX_GPUS)}")
    if not TensorRtRtx().ahead(recipe.engine.options()):
        what = "what builds for the GPUs that are named is not installed"
        raise EnvironmentLackError(what, named, TensorRtRtx.install)


def candidates(recipe: Recipe, *, traceable: bool) -> list[Candidate]:
    """The recipe's variants, in the order of its targets.

    Args:
        recipe: Names targets and precisions.
        traceable: The source has a PyTorch module, from which a `torch.export` program can be made.
    """
    from exporter.targets import get_target

    found: list[Candidate] = []
    for name in recipe.targets:
        target = get_target(name)
        for variant in target.variants(recipe.precisions, every_form=recipe.forms == "all"):
            state = target.buildable(variant)
            skip, remedy = ("", "") if state.available else (state.reason, state.remedy)
            if target.consumes == "pt2" and not traceable:
                skip, remedy = "the source is an ONNX file, and this target compiles PyTorch", "Give the PyTorch model"
            options = recipe.engine.options()
            if not skip and (skip := target.elsewhere(options)):
                remedy = "planish verify judges it where such a GPU is"
            ahead = bool(skip) and target.ahead(options)
            found.append(Candidate(variant, target.ingredient(variant), target.portable, skip, remedy, ahead))
    return found


def ingredients(found: Sequence[Candidate]) -> set[str]:
    """The exports to make: what runs here, and the portable ONNX files that targets elsewhere take."""
    return {c.ingredient for c in found if not c.skip or c.ahead or c.ingredient in PORTABLE_FILES}


def points_of(signature: Signature, points: Sequence[str]) -> list[dict[str, int]]:
    """Operating points as lengths of the signature's axes; what a point does not name has its smallest length."""
    from pipelines.recipe_sections import parse_point

    length = signature.length
    found = []
    for point in points:
        batch, tokens = parse_point(point)
        lengths = {axis.name: axis.min for axis in signature.axes}
        if "batch" in lengths:
            lengths["batch"] = batch
        if tokens is not None and length is not None:
            lengths[length.name] = tokens
        found.append(lengths)
    return found


def original_key(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that open the original, without paths: what the result depends on, wherever the source lies."""
    source = arguments["source"]
    kept = {key: source[key] for key in ("kind", "digest", "trust_remote_code")}
    return {**arguments, "source": kept}
