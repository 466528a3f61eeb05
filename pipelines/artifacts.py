"""Making a run's artifacts: exports, optimized graphs, lowered precisions, engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from exporter.artifact import Artifact
from exporter.errors import EnvironmentLackError, NoSpaceError, PlanishError
from exporter.targets import get_target
from exporter.targets.base import BuildHow
from pipelines.cache import default_root
from pipelines.plan import Candidate, ingredients, points_of
from pipelines.quantizing import Base, Learning, learn, needs, quantize
from pipelines.recipe_sections import Export
from pipelines.trust import remember_engine
from pipelines.workshop import BUILDERS, ONNX, TORCH, Made, Workshop

FUSED = "onnx-fp32-fused"
HALF = ("onnx-bf16", "onnx-fp16")


@dataclass
class Artifacts:
    """What was made, by ingredient (``onnx-fp16``), and why something was not.

    Attributes:
        ready: Artifacts that targets open or build from.
        ids: Identity of each, for the stages that read it.
        emulations: FP32 graphs that round as the half artifact of that ingredient does.
        errors: Why an ingredient could not be made.
        made_from: What each quantized artifact was quantized from.
        passes: Records of the graph passes.
        precision: Records of the conversions to a lower precision.
        calibration: The stage that took the ranges, where one did.
        measured: The stage that measured the FP32 graph's tensors for half forms, where one did.
        engines: By variant id: the files built, the first to open, and the engine's SHA-256.
        points: The operating points that engines are built for.
        options: Of the builders of engines.
    """

    ready: dict[str, Artifact] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)
    emulations: dict[str, Artifact] = field(default_factory=dict)
    errors: dict[str, PlanishError] = field(default_factory=dict)
    made_from: dict[str, Base] = field(default_factory=dict)
    passes: dict[str, Any] = field(default_factory=dict)
    precision: dict[str, Any] = field(default_factory=dict)
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    points: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    calibration: Made | None = None
    measured: Made | None = None

    def put(self, ingredient: str, made: Made, path: str, like: Artifact) -> None:
        self.ready[ingredient] = Artifact(made.folder / path, like.format, like.signature, like.contract)
        self.ids[ingredient] = made.id


def export_onnx(shop: Workshop, original: dict[str, Any], original_id: dict[str, Any], export: Export) -> Made:
    """Export to ONNX: what every portable artifact is made from.

    Raises:
        PlanishError: The model cannot be exported.
    """
    how = {"opset": export.opset, "external_data": export.external_data}
    return shop.make(
        "export-onnx",
        "Export to ONNX",
        "pipelines.stages.export:to_onnx",
        {"original": original, **how},
        inputs={"original": original_id, **how},
        packages=(*TORCH, *ONNX),
    )


def export_program(
    shop: Workshop, original: dict[str, Any], original_id: dict[str, Any], precision: str = "fp32"
) -> Made:
    """Export to a `torch.export` program: what compiled engines are made from.

    Raises:
        PlanishError: The model cannot be exported.
    """
    return shop.make(
        "export-program" if precision == "fp32" else f"export-program-{precision}",
        "Export to torch.export" if precision == "fp32" else f"Export to torch.export in {precision.upper()}",
        "pipelines.stages.export:to_program",
        {"original": original, "precision": precision},
        inputs={"original": original_id, "precision": precision},
        packages=TORCH,
    )


def with_needs(asked: set[str]) -> set[str]:
    """The ingredients that are asked for, and those that these are made from."""
    return asked | {needed for ingredient in asked if (needed := needs(ingredient)) is not None}


def make_artifacts(
    shop: Workshop,
    recorded: Made,
    exported: Made,
    programs: Mapping[str, Made | PlanishError],
    planned: Sequence[Candidate],
    export: Export,
    learning: Learning,
    options: Mapping[str, Any],
) -> Artifacts:
    """Make every ingredient that a run's candidates ask for, what these are made from, and the engines.

    The portable FP32 ONNX graph is always made; failing there ends the run. Any other failure is kept in `errors`.

    Args:
        shop: Makes the stages.
        recorded: What the original computes.
        exported: See `export_onnx`.
        programs: By ingredient, see `export_program`; or why there is none.
        planned: The candidates.
        export: How ONNX files are written.
        learning: What calibration learns from.
        options: Of the builders of engines.

    Raises:
        PlanishError: The exported graph cannot be optimized.
    """
    result = Artifacts(points=recorded.record["points"], options=options)
    wanted = with_needs(ingredients(planned))
    for name, program in programs.items():
        if isinstance(program, PlanishError):
            result.errors[name] = program
            continue
        made = Artifact.from_dict(program.record["artifact"])
        result.ready[name] = Artifact(program.folder / made.path, "pt2", made.signature, made.contract)
        result.ids[name] = program.id
    works = [lambda: _make_onnx(shop, result, recorded, exported, wanted, planned, export, learning)]
    for ingredient in sorted(wanted, key=lambda name: (needs(name) is None, name)):  # what takes longest first
        if not ingredient.startswith("onnx-"):
            works.append(partial(_make_engines, shop, result, ingredient, planned, export, learning))
    shop.together(works)
    return result


def _make_onnx(
    shop: Workshop,
    result: Artifacts,
    recorded: Made,
    exported: Made,
    wanted: set[str],
    planned: Sequence[Candidate],
    export: Export,
    learning: Learning,
) -> None:
    """Everything that is an ONNX file, and the engines that are built from these."""
    raw = Artifact.from_dict(exported.record["artifact"])
    raw = Artifact(exported.folder / raw.path, raw.format, raw.signature, raw.contract)
    plain = _optimize(shop, raw, exported.id, recorded, export, fuse=False)
    result.put("onnx-fp32", plain, plain.record["path"], raw)
    result.passes["onnx-fp32"] = plain.record["record"]
    base, base_id = result.ready["onnx-fp32"], plain.id
    if FUSED in wanted:
        with _Kept(result, FUSED):
            fused = _optimize(shop, base, base_id, recorded, export, fuse=True)
            result.put(FUSED, fused, fused.record["path"], raw)
            result.passes[FUSED] = fused.record["record"]
    for ingredient in sorted(wanted & set(HALF)):
        with _Kept(result, ingredient):
            _lower(shop, result, ingredient, base, base_id, export, learning)
    for ingredient in sorted(name for name in wanted if name.startswith("onnx-") and needs(name) is not None):
        _quantize(shop, result, ingredient, export, learning)
    for ingredient in sorted(name for name in wanted if name.startswith("onnx-")):
        _engines_from(shop, result, ingredient, planned)


def _make_engines(
    shop: Workshop,
    result: Artifacts,
    ingredient: str,
    planned: Sequence[Candidate],
    export: Export,
    learning: Learning,
) -> None:
    """One program that engines are compiled from, and these engines."""
    if needs(ingredient) is not None:
        _quantize(shop, result, ingredient, export, learning)
    _engines_from(shop, result, ingredient, planned)


def _engines_from(shop: Workshop, result: Artifacts, ingredient: str, planned: Sequence[Candidate]) -> None:
    """The engines that are built from one artifact, where that could be made: for this machine, or ahead for others."""
    for candidate in planned:
        if candidate.ingredient != ingredient or candidate.portable or ingredient not in result.ready:
            continue
        if not candidate.skip or candidate.ahead:
            try_engine(shop, result, candidate)


def _quantize(shop: Workshop, result: Artifacts, ingredient: str, export: Export, learning: Learning) -> None:
    if error := result.errors.get(str(needs(ingredient))):
        result.errors[ingredient] = error
        return
    with _Kept(result, ingredient):
        quantize(shop, result, ingredient, learning, export.external_data)


def try_engine(shop: Workshop, artifacts: Artifacts, candidate: Candidate) -> None:
    """Compile what a target opens, and trust it from now on; why it cannot be compiled goes to the errors."""
    try:
        build_engine(shop, artifacts, candidate)
    except PlanishError as error:
        if error.exit_status == 130 or isinstance(error, NoSpaceError):
            raise
        artifacts.errors[candidate.variant.id] = error
        return
    # Where it cannot be remembered the engine is as good as none, and it is not the engine that is wrong.
    remember_engine(artifacts.engines[candidate.variant.id]["digest"])


def build_engine(shop: Workshop, artifacts: Artifacts, candidate: Candidate) -> None:
    """Compile what a target opens, and put the engine into `artifacts`.

    Raises:
        PlanishError: It cannot be compiled.
    """
    variant = candidate.variant
    source = artifacts.ready[candidate.ingredient]
    timings = {"timing_cache": str(default_root() / "timings")} if get_target(variant.target).keeps_timings else {}
    how = BuildHow(tuple(points_of(source.signature, artifacts.points)), {**artifacts.options, **timings})
    made = shop.make(
        f"build-{variant.id}",
        f"Compile {variant.id}",
        "pipelines.stages.transform:build",
        {
            "artifact": source.to_dict(),
            "variant": variant_dict(candidate),
            "how": {"points": how.points, "options": dict(how.options)},
        },
        inputs={
            "ingredient": artifacts.ids[candidate.ingredient],
            "variant": variant.id,
            "how": get_target(variant.target).depends_on(variant, how),
        },
        packages=("torch", *BUILDERS),
        bound_to_machine=True,
    )
    files = [made.folder / name for name in made.record["files"]]
    artifacts.engines[variant.id] = {"files": files, "digest": made.record["digest"], "id": made.id}


def variant_dict(candidate: Candidate) -> dict[str, Any]:
    """A candidate's variant as plain data."""
    variant = candidate.variant
    return {"target": variant.target, "precision": variant.precision, "form": variant.form}


def _optimize(shop: Workshop, artifact: Artifact, identity: str, recorded: Made, export: Export, *, fuse: bool) -> Made:
    how = {"fuse": fuse, "external_data": export.external_data}
    return shop.make(
        "fuse" if fuse else "optimize",
        "Fuse for ONNX Runtime" if fuse else "Optimize the graph",
        "pipelines.stages.transform:optimize",
        {"artifact": artifact.to_dict(), "recorded": str(recorded.folder), **how},
        inputs={"artifact": identity, "recorded": recorded.id, **how},
        packages=(*ONNX, "transformers") if fuse else ONNX,
    )


def _lower(
    shop: Workshop,
    result: Artifacts,
    ingredient: str,
    base: Artifact,
    base_id: str,
    export: Export,
    learning: Learning,
) -> None:
    precision = ingredient.split("-")[1]
    if result.measured is None:  # one for all half forms
        function = "pipelines.stages.ranges:measure"
        result.measured = learn(shop, "measure-ranges", "Measure activations", function, base, base_id, learning)
    measured = result.measured
    path = measured.record["path"]
    how = {"precision": precision, "external_data": export.external_data}
    ranges = {"ranges": path and str(measured.folder / path), "measured": measured.record["record"]}
    lowered = shop.make(
        f"lower-{precision}",
        f"Convert to {precision.upper()}",
        "pipelines.stages.transform:lower",
        {"artifact": base.to_dict(), **how, **ranges},
        inputs={"artifact": base_id, "ranges": measured.id, **how},
        packages=ONNX,
    )
    result.put(ingredient, lowered, lowered.record["path"], base)
    emulation = lowered.folder / lowered.record["emulation"]
    result.emulations[ingredient] = Artifact(emulation, "onnx", base.signature, base.contract)
    result.precision[ingredient] = lowered.record["record"]


class _Kept:
    """Keeps an ingredient's failure for the report; a lack of space or memory still ends the run."""

    def __init__(self, result: Artifacts, ingredient: str) -> None:
        self.result = result
        self.ingredient = ingredient

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, PlanishError) and not isinstance(error, EnvironmentLackError):
            self.result.errors[self.ingredient] = error
            return True
        return False
