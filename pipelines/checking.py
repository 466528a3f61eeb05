"""Checking a bundle again on this machine: integrity, its golden samples, latency, and the source."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.artifact import Artifact
from exporter.errors import PlanishError, RequestError
from exporter.original.plain import original_arguments
from exporter.sources import resolve_source
from exporter.targets import get_target
from exporter.tasks import get_task
from pipelines.baselines import reference_of
from pipelines.bundle import Bundle, Difference, check_integrity, read_bundle
from pipelines.cache import log_folder
from pipelines.manifest import MANIFEST, VariantEntry
from pipelines.opening import OPENER, opening
from pipelines.processes import run_job
from pipelines.progress import Progress
from pipelines.recipe import usable_cores
from pipelines.stages.recheck import GOLDEN
from pipelines.trust import trusted
from pipelines.verification.gates import worst_verdict
from pipelines.workshop import PATIENT

__all__ = ["Verification", "bench_bundle", "verify"]


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        bundle: The folder.
        differences: Files that are not as they were written; while there are any, nothing is opened.
        variants: By id: ``status``, ``reason``, and the gates' records; ``before``, where it had not passed: a variant
            that could not run where the bundle was made is judged where it can.
        latency: The measurement against the bundle's own FP32 ONNX, empty where it was not asked for.
        source: The comparison with the source, where it was asked for.
    """

    bundle: Path
    differences: tuple[Difference, ...] = ()
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    latency: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] | None = None

    @property
    def ok(self) -> bool:
        """Nothing was changed, and nothing that had passed fails here."""
        held = [entry for entry in self.variants.values() if "before" not in entry]  # the others had not passed
        failed = any(entry["status"] == "failed" for entry in held)
        against = self.source is not None and self.source["verdict"] == "failed"
        return not self.differences and not failed and not against

    def to_dict(self) -> dict[str, Any]:
        return {
            "bundle": str(self.bundle),
            "ok": self.ok,
            "differences": [{"path": str(d.path), "kind": d.kind, "detail": d.detail} for d in self.differences],
            "variants": {name: dict(entry) for name, entry in self.variants.items()},
            "latency": dict(self.latency),
            "source": None if self.source is None else dict(self.source),
        }


def verify(
    bundle: Bundle | Path | str,
    *,
    against: str | None = None,
    latency: bool = True,
    trust: bool = False,
    budget_s: float = 30.0,
    progress: Progress | None = None,
) -> Verification:
    """Check a bundle again, on this machine, from the bundle alone.

    Variants that had passed are opened and judged by the samples under ``evidence/golden``. Engines that do not fit
    this machine, or were built elsewhere and are not trusted, are skipped with the reason.

    Args:
        bundle: Its folder.
        against: Compare with this source too.
        latency: Measure latency too, against the bundle's own FP32 ONNX.
        trust: Open engines that this user's cache did not build, which are native code, and run the Python code that
            the source brings where the bundle's recipe did.
        budget_s: Seconds to measure for.
        progress: Tells how it goes.

    Raises:
        RequestError: It is no bundle, or the source is wrong or brings code and is not trusted.
    """
    folder = bundle.path if isinstance(bundle, Bundle) else Path(bundle)
    progress = progress or Progress(quiet=True)
    if not folder.is_dir():
        raise RequestError("no such bundle", folder, f"A bundle is a folder with a {MANIFEST} in it")
    if not os.path.lexists(folder / MANIFEST):
        if not (folder / GOLDEN).is_dir():
            raise RequestError("not a bundle", folder, f"A bundle is a folder with a {MANIFEST} in it")
        return Verification(folder, (Difference(MANIFEST, "missing", "what else is here looks like a bundle"),))
    with progress.step("Check every file"):
        differences = tuple(check_integrity(folder))
    if differences:
        return Verification(folder, differences)
    opened = read_bundle(folder)
    if against is not None:
        _refuse_code(opened, against, trust)
    log = _log(opened)
    threads = usable_cores()
    digests = trusted_digests(opened, trust)
    results = {entry.id: _variant(opened, entry, digests, threads, log, progress) for entry in opened.manifest.variants}
    source = None if against is None else _source(opened, against, trust, log, progress)
    timed = {}
    if latency:
        names = [name for name, entry in results.items() if entry["status"] in ("passed", "inconclusive")]
        timed = bench_bundle(opened, names, digests, threads=threads, budget_s=budget_s, progress=progress)
    return Verification(folder, (), results, timed, source)


def bench_bundle(
    bundle: Bundle,
    names: list[str],
    digests: frozenset[str],
    *,
    threads: int,
    budget_s: float,
    progress: Progress,
    points: list[str] | None = None,
) -> dict[str, Any]:
    """Time variants of a bundle, against its own FP32 ONNX where that is among them.

    Raises:
        RequestError: The bundle carries no inputs for a point.
    """
    from pipelines.verification.latency import Plan, measure
    from pipelines.verification.worker_process import WorkerSpec

    folder = bundle.path / GOLDEN / "points"
    inputs = {path.stem: path for path in sorted(folder.glob("*.safetensors"))}
    ordered = points or [name for name in bundle.points if name in inputs] or list(inputs)
    if unknown := [name for name in ordered if name not in inputs]:
        raise RequestError(
            "the bundle has no inputs for an operating point", unknown[0], f"It has: {', '.join(inputs)}"
        )
    entries = [bundle.variant(name) for name in names]
    if not entries or not ordered:
        return {}
    specs = [
        WorkerSpec(
            entry.id,
            OPENER,
            opening(entry.variant, bundle.artifact(entry), digests),
            threads,
            files=tuple(bundle.files_of(entry)),
            estimated_bytes=2 * sum(path.stat().st_size for path in bundle.files_of(entry)) + 300_000_000,
        )
        for entry in entries
    ]
    with progress.step("Measure latency"):
        result = measure(
            specs,
            {name: inputs[name] for name in ordered},
            log=_log(bundle),
            plan=Plan(budget_s=budget_s),
            baseline=reference_of(names),
            best_of=(),
            on_line=progress.update,
        )
    return result.to_dict()


def _variant(
    bundle: Bundle, entry: VariantEntry, digests: frozenset[str], threads: int, log: Path, progress: Progress
) -> dict[str, Any]:
    state = get_target(entry.target).availability(entry.variant)
    was = {} if entry.status == "passed" else {"before": entry.status}
    if was and not (entry.status == "skipped" and entry.files and state.available):
        why = f": {entry.reason}" if entry.reason else ""
        return {"status": "skipped", "reason": f"it was {entry.status} when the bundle was made{why}", "gates": {}}
    if not entry.files:
        return {"status": "skipped", "reason": "its files were not kept", "gates": {}}
    if not state.available:
        return {"status": "skipped", "reason": f"{state.reason}. {state.remedy}", "gates": {}}
    artifact = bundle.artifact(entry)
    if refusal := _refusal(entry, artifact, digests):
        return {"status": "skipped", "reason": refusal, "gates": {}}
    arguments = {
        "bundle": str(bundle.path),
        "opening": opening(entry.variant, artifact, digests),
        "precision": entry.precision,
        "threads": threads,
    }
    try:
        with progress.step(f"Check {entry.id}"):
            record = run_job(
                "pipelines.stages.recheck:variant_again",
                arguments,
                log=log,
                env=PATIENT,
                threads=threads,
                on_line=progress.update,
            ).value
    except PlanishError as error:
        return {**was, "status": "failed", "reason": str(error), "gates": {}}
    gates = {"parity": record["parity"], "quality": record["quality"]}
    status = worst_verdict(gate["verdict"] for gate in gates.values())
    told = [f"{name}: {gate['reason']}" for name, gate in gates.items() if gate["verdict"] == status]
    return {**was, "status": status, "reason": "; ".join(told), "gates": gates, "executed": record["executed"]}


def _refusal(entry: VariantEntry, artifact: Artifact, digests: frozenset[str]) -> str:
    target = get_target(entry.target)
    if not target.portable and artifact.path.suffix == ".onnx":
        return "the bundle has the file that its engine is built from, and no engine"
    try:
        target.check(artifact, digests)
    except RequestError as error:
        return str(error)
    return ""


def _refuse_code(bundle: Bundle, spec: str, trust: bool) -> None:
    """A manifest proves no origin: that it claims its maker's trust in the source's code gives it nobody else's."""
    if bundle.manifest.recipe.get("trust_remote_code") and not trust:
        raise RequestError(
            "the bundle was made with Python code that its source brings, and comparing would run it",
            spec,
            "Read the code, then add --trust",
        )


def _exported_digest(bundle: Bundle) -> str:
    """Of the model that was exported: the source, or what compression left of it."""
    compression = bundle.manifest.compression
    return str(compression["hops"][-1]["digest"]) if compression else bundle.manifest.source.digest


def _source(bundle: Bundle, spec: str, trust: bool, log: Path, progress: Progress) -> dict[str, Any]:
    recipe = bundle.manifest.recipe
    remote = trust and bool(recipe.get("trust_remote_code"))
    source = resolve_source(spec, revision=recipe.get("revision"), trust=trust, trust_remote_code=remote)
    wanted = _exported_digest(bundle)
    if source.digest != wanted:
        reason = f"{spec} has digest {source.digest}, the bundle was made from {wanted}"
        if source.digest == bundle.manifest.source.digest:
            reason = f"{spec} is what compression began with; compare with what it left, as planish compress writes it"
        return {"verdict": "failed", "reason": reason}
    if source.kind == "onnx":
        return {"verdict": "passed", "reason": "the source is an ONNX file of the same digest"}
    original = original_arguments(
        source,
        get_task(bundle.manifest.task),
        max_batch=recipe["export"]["max_batch"],
        max_length=recipe["export"]["max_length"],
        attends=recipe["contract"]["attends"],
        custom=recipe["custom"],
    )
    with progress.step("Run the source"):
        job = run_job(
            "pipelines.stages.recheck:source_again",
            {"bundle": str(bundle.path), "original": original},
            log=log,
            env=PATIENT,
            threads=usable_cores(),
            on_line=progress.update,
        )
    return dict(job.value["parity"])


def trusted_digests(bundle: Bundle, trust: bool) -> frozenset[str]:
    """Digests of the engines that may be opened: those that this user built, and with `trust` the bundle's own."""
    own = frozenset(entry.sha256 for name, entry in bundle.manifest.files.items() if name.startswith("variants/"))
    return trusted() | (own if trust else frozenset())


def _log(bundle: Bundle) -> Path:
    return log_folder() / f"{bundle.manifest.name}-verify.log"
