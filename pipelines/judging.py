"""Checking and timing a run's variants: the gates' records, and the race."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifact import Artifact, Variant
from exporter.errors import NotApplicableError, PlanishError
from exporter.onnx_files import external_data_name
from exporter.targets import get_target
from exporter.targets.onnxruntime import LITERAL
from pipelines.artifacts import Artifacts, variant_dict
from pipelines.baselines import COMPILE_HALF, EAGER, ONNX_SOURCE, PYTORCH, baselines_of, reference_of
from pipelines.opening import OPENER, opening
from pipelines.plan import PORTABLE_FILES, Candidate
from pipelines.recipe import Recipe
from pipelines.verification.gates import VERDICTS, latency_gate, skipped, variant_status
from pipelines.verification.judgement import RULES
from pipelines.verification.latency_result import spoils
from pipelines.workshop import GPU, ONNX, TORCH, Made, Workshop

if TYPE_CHECKING:
    from pipelines.verification.worker_process import WorkerSpec

CPU_RUNNER = "onnxruntime-cpu"
RACE_CODE = (
    "pipelines.verification.latency",
    "pipelines.judging",
    "pipelines.opening",
    "exporter.targets",
    "exporter.targets.pytorch",
)
"""What a timing depends on: how it is measured, and how each session is opened and run."""
ITSELF = "the artifact itself, on ONNX Runtime CPU"
"""How parity names the runner of an artifact whose own target is not here."""


@dataclass
class Judged:
    """A variant and what is known of it.

    Attributes:
        candidate: What was planned.
        artifact: What is opened; ``None`` where it could not be made.
        files: Everything that belongs to it; the first is opened.
        identity: For the stages that read it.
        trusted: Digests of its engines, which this run built itself.
        gates: Records by gate.
        executed: What ran.
        timing: Of the race, see `WorkerTiming.to_dict`.
        checked: The stage that judged it where it runs here; its predictions lie in the stage's folder.
    """

    candidate: Candidate
    artifact: Artifact | None = None
    files: list[Path] = field(default_factory=list)
    identity: str = ""
    trusted: frozenset[str] = frozenset()
    gates: dict[str, dict[str, Any]] = field(default_factory=dict)
    executed: dict[str, Any] | None = None
    timing: dict[str, Any] = field(default_factory=dict)
    checked: Made | None = None

    @property
    def runs_here(self) -> bool:
        return self.artifact is not None and not self.candidate.skip and self.executed is not None

    @property
    def status(self) -> tuple[str, str]:
        """Verdict and reason."""
        status, reason = variant_status(self.gates)
        if self.candidate.skip and VERDICTS.index(status) <= VERDICTS.index("skipped"):  # good numbers are no run
            remedy = f" {self.candidate.remedy}" if self.candidate.remedy else ""
            return "skipped", f"{self.candidate.skip}.{remedy}"
        return status, reason


def locate(candidate: Candidate, artifacts: Artifacts) -> Judged:
    """The variant with its files, or with the reason why it has none."""
    variant = candidate.variant
    if variant.id in artifacts.engines:
        engine = artifacts.engines[variant.id]
        like = artifacts.ready[candidate.ingredient]
        if candidate.skip:  # built ahead: its numbers are looked at in what it was built from
            there = f"{candidate.skip}. Its engine is in the bundle, for the GPUs that the recipe names"
            remedy = f"planish verify judges it there. {candidate.remedy}"
            candidate = replace(candidate, skip=there, remedy=remedy)
            return Judged(candidate, like, engine["files"], artifacts.ids[candidate.ingredient])
        artifact = Artifact(engine["files"][0], "aoti", like.signature, like.contract)
        return Judged(candidate, artifact, engine["files"], engine["id"], frozenset([engine["digest"]]))
    if candidate.ahead and (error := artifacts.errors.get(variant.id)):  # what it would have been built from is there
        told = f"it could not be built ahead: {error}. Nor can it run here: {candidate.skip}"
        candidate = replace(candidate, skip=told)
    elif error := artifacts.errors.get(variant.id) or artifacts.errors.get(candidate.ingredient):
        if isinstance(error, NotApplicableError):
            gate = skipped(str(error))
            return Judged(candidate, gates={"parity": gate, "quality": gate})
        failed = {"verdict": "failed", "reason": str(error)}
        return Judged(candidate, gates={"parity": failed, "quality": skipped("there is nothing to run")})
    artifact_ready = artifacts.ready.get(candidate.ingredient)
    if artifact_ready is None or (candidate.skip and candidate.ingredient not in PORTABLE_FILES):
        reason = skipped(candidate.skip or "it was not made")
        return Judged(candidate, gates={"parity": reason, "quality": reason})
    paths = [artifact_ready.path, *_beside(artifact_ready.path)]
    return Judged(candidate, artifact_ready, paths, artifacts.ids[candidate.ingredient])


def _beside(model: Path) -> list[Path]:
    data = model.with_name(external_data_name(model))
    return [data] if data.is_file() else []


def gate_settings(recipe: Recipe) -> dict[str, Any]:
    """What the quality gate is told: the recipe's section, with the worst drop that it allows."""
    settings = recipe.quality.model_dump()
    settings["max_drop_worst"] = settings["max_drop_worst"] or 2 * settings["max_drop"]
    return settings


@dataclass
class Bench:
    """What checking needs beside the variants themselves."""

    shop: Workshop
    recipe: Recipe
    original: dict[str, Any]
    recorded: Made
    data: dict[str, Any]
    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By ingredient, the gates of the variants that take it elsewhere."""

    def check_all(self, variants: Sequence[Judged], artifacts: Artifacts) -> None:
        """Fill in the variants' parity and quality gates."""
        made = [judged for judged in variants if judged.artifact is not None]
        self.shop.together([partial(self._check_here, judged) for judged in made if not judged.candidate.skip])
        # The others cannot run here, but their numbers can be looked at: by ONNX Runtime on the CPU, and rounded at
        # every edge. What several targets take is looked at once.
        others = {judged.candidate.ingredient: judged for judged in reversed(made) if judged.candidate.skip}
        self.shop.together(
            [partial(self._look, judged, artifacts) for name, judged in others.items() if name not in self.numbers]
        )
        for judged in made:
            if judged.candidate.skip:
                judged.gates["quality"] = skipped(judged.candidate.skip)
                judged.gates.update(self.numbers[judged.candidate.ingredient])

    def _look(self, judged: Judged, artifacts: Artifacts) -> None:
        if judged.artifact is None:
            return
        try:
            numbers = self._numbers(judged.artifact, judged.identity, judged.candidate.variant.precision, artifacts)
        except PlanishError as error:
            if error.exit_status in (3, 130):
                raise
            # Its own target may well run it: what is missing is the look at its numbers.
            reason = f"its numbers could not be looked at here: {error}"
            numbers = {"parity": {"verdict": "inconclusive", "reason": reason}}
        self.numbers[judged.candidate.ingredient] = numbers

    def _numbers(
        self, artifact: Artifact, identity: str, precision: str, artifacts: Artifacts
    ) -> dict[str, dict[str, Any]]:
        """The gates of a portable artifact whose own target is not here: parity, and quality where that judges."""
        if RULES[precision].multiple is None:
            label = f"{precision} emulated: FP32 kernels, rounded to {precision} by the Q/DQ pairs of the graph"
            title = f"Check the numbers of {precision}, emulated"
            literal = Variant(CPU_RUNNER, precision, LITERAL)
            record = self._stage(literal, artifact, identity, frozenset(), quality=True, title=title).record
            return {name: {**record[name], "runner": label} for name in ("parity", "quality")}
        emulation = artifacts.emulations.get(f"onnx-{precision}")
        runner = Variant(CPU_RUNNER, precision)
        records = {}
        if emulation is not None:
            label = f"{precision} emulated: FP32 kernels, rounded to {precision} at every typed edge"
            title = f"Check the numbers of {precision}, emulated"
            records[label] = self._stage(runner, emulation, identity + "-emulated", frozenset(), title=title).record
        if precision != "bf16":  # ONNX Runtime has no BF16 kernels on a CPU
            title = f"Check the numbers of {precision} on ONNX Runtime"
            records[ITSELF] = self._stage(runner, artifact, identity, frozenset(), title=title).record
        return {"parity": _together({name: record["parity"] for name, record in records.items()})}

    def _check_here(self, judged: Judged) -> None:
        variant = judged.candidate.variant
        if judged.artifact is None:
            return
        try:
            judged.checked = self._stage(variant, judged.artifact, judged.identity, judged.trusted, quality=True)
        except PlanishError as error:
            if error.exit_status in (3, 130):
                raise
            judged.gates["parity"] = {"verdict": "failed", "reason": str(error)}
            judged.gates["quality"] = skipped("it does not run")
            return
        record = judged.checked.record
        judged.executed = record["executed"]
        judged.gates["parity"] = record["parity"]
        judged.gates["quality"] = record["quality"]
        if variant.id == f"{CPU_RUNNER}-fp32":  # the same file and the same runner as `_numbers` would take
            self.numbers[judged.candidate.ingredient] = {"parity": _together({ITSELF: record["parity"]})}

    def _stage(
        self,
        variant: Variant,
        artifact: Artifact,
        identity: str,
        trusted: frozenset[str],
        *,
        quality: bool = False,
        title: str | None = None,
    ) -> Made:
        settings = gate_settings(self.recipe)
        return self.shop.make(
            f"check-{variant.id}",
            title or f"Check {variant.id}",
            "pipelines.stages.check:check",
            {
                "opening": opening(variant, artifact, trusted),
                "threads": self.shop.threads,
                "precision": variant.precision,
                "recorded": str(self.recorded.folder),
                "quality": quality,
                "original": self.original,
                "data": self.data,
                "settings": settings,
                "seed": self.recipe.seed,
            },
            inputs={
                "artifact": identity,
                "recorded": self.recorded.id,
                "variant": variant.id,
                "quality": quality,
                "settings": settings,
            },
            packages=(*ONNX, *GPU, "openvino", "torch"),
            bound_to_machine=True,
        )

    def race(self, variants: Sequence[Judged], points: Sequence[str], *, anew: bool = False) -> dict[str, Any]:
        """Time every variant that runs here, and the baselines; returns the whole record.

        An earlier run's record of the same is taken instead, unless it is to be measured `anew`.
        """
        timed = [judged for judged in variants if judged.runs_here]
        latency = self.recipe.latency
        baselines = baselines_of(self.original["source"]["kind"], latency.baselines, device_of(timed))
        if not timed or not points:
            return {}
        if anew:
            with self.shop.progress.step("Measure latency"):
                return self._measure(timed, points, baselines)
        key = self.shop.key(
            "race",
            RACE_CODE,
            inputs={
                "variants": {judged.candidate.variant.id: judged.identity for judged in timed},
                "recorded": self.recorded.id,
                "points": list(points),
                "latency": latency.model_dump(mode="json", exclude={"points", "min_speedup"}),
                "seed": self.recipe.seed,
                "original": self.original["source"]["digest"],
            },
            packages=(*ONNX, *TORCH, *GPU, "openvino"),
            bound_to_machine=True,
            timed=True,
        )
        return self.shop.measure(
            key,
            "Measure latency",
            lambda: self._measure(timed, points, baselines),
            worth=lambda race: not spoils(race["busy_elsewhere"]),
        )

    def workers(self, timed: Sequence[Judged], baselines: Sequence[str]) -> list[WorkerSpec]:
        """What opens the baselines and the variants that run here, each in a process of its own."""
        from pipelines.verification.worker_process import WorkerSpec

        weights = int(self.original["source"]["weights_bytes"])
        # The kernels of a GPU are compiled by processes of their own, which would go on while a worker is stopped.
        env = {"TORCHINDUCTOR_COMPILE_THREADS": "1"} if device_of(timed) == "cuda" else {}
        specs = [
            WorkerSpec(
                name,
                *self._baseline(name, timed),
                self.shop.threads,
                estimated_bytes=2 * weights + 500_000_000,
                env=env,
                is_baseline=True,
            )
            for name in baselines
        ]
        for judged in timed:
            if judged.artifact is not None:
                specs.append(
                    WorkerSpec(
                        judged.candidate.variant.id,
                        OPENER,
                        opening(judged.candidate.variant, judged.artifact, judged.trusted),
                        self.shop.threads,
                        files=tuple(judged.files),
                        estimated_bytes=2 * weights + 300_000_000,
                    )
                )
        return specs

    def point_files(self, points: Sequence[str]) -> dict[str, Path]:
        """The inputs of operating points, by label."""
        return {label: self.recorded.folder / "points" / f"{label}.safetensors" for label in points}

    def _measure(self, timed: Sequence[Judged], points: Sequence[str], baselines: Sequence[str]) -> dict[str, Any]:
        from pipelines.verification.latency import Plan, measure

        specs, latency = self.workers(timed, baselines), self.recipe.latency
        result = measure(
            specs,
            self.point_files(points),
            log=self.shop.log,
            plan=Plan(budget_s=latency.budget_s, min_block_ms=latency.min_block_ms, seed=self.recipe.seed),
            baseline=reference_of([spec.name for spec in specs]),
            best_of=[name for name in baselines if name in PYTORCH],
            on_line=self.shop.progress.update,
        )
        return result.to_dict()

    def _baseline(self, name: str, timed: Sequence[Judged]) -> tuple[str, dict[str, Any]]:
        """How a worker opens a baseline: the function and its arguments."""
        if name == ONNX_SOURCE:
            like = next(judged.artifact for judged in timed if judged.artifact is not None)
            source = Artifact(Path(self.original["source"]["path"]), "onnx", like.signature, like.contract)
            return OPENER, opening(Variant(CPU_RUNNER, "fp32"), source)
        opener = "open_eager" if name == EAGER else "open_compiled"
        precision = "fp16" if name == COMPILE_HALF else "fp32"
        how = {"original": self.original, "precision": precision, "device": device_of(timed)}
        return f"exporter.targets.pytorch:{opener}", how


def device_of(timed: Sequence[Judged]) -> str:
    """Where PyTorch is timed: on the GPU where any variant runs there, and then all are compared with it there."""
    on_gpu = any(get_target(judged.candidate.variant.target).device == "cuda" for judged in timed)
    return "cuda" if on_gpu else "cpu"


def add_timings(variants: Sequence[Judged], race: dict[str, Any], min_speedup: float | None) -> None:
    """Give each variant its timing and its latency gate."""
    for judged in variants:
        timing = race.get("variants", {}).get(judged.candidate.variant.id)
        if timing is None:
            continue
        judged.timing = timing
        if timing["error"]:
            judged.gates["latency"] = {**skipped(f"not timed: {timing['error']}"), "gates": min_speedup is not None}
        else:
            judged.gates["latency"] = latency_gate(timing["points"], min_speedup)


def _together(records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One parity record from those of several ways to run an artifact: the worst of them, with the others beside it."""

    def badness(name: str) -> tuple[int, float]:
        return VERDICTS.index(records[name]["verdict"]), records[name].get("ratio") or 0.0

    worst = max(records, key=badness)
    others = {
        name: {key: record.get(key) for key in ("verdict", "reason", "ratio", "outputs")}
        for name, record in records.items()
        if name != worst
    }
    return {**records[worst], "runner": worst, "also": others}


__all__ = ["Bench", "Judged", "add_timings", "gate_settings", "locate", "variant_dict"]
