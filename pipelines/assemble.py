"""Assembling a run's results: the manifest, the report and the files of the bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.errors import InternalError
from exporter.hardware import probe
from exporter.onnx_files import external_data_name
from exporter.sources import Source
from exporter.targets import get_target
from pipelines.artifacts import FUSED, Artifacts
from pipelines.baselines import EAGER, label
from pipelines.cache_entry import package_version
from pipelines.compress.brief import brief_steps
from pipelines.judging import Judged
from pipelines.manifest import InputContractEntry, Manifest, PointEntry, SourceEntry, VariantEntry
from pipelines.plan import PORTABLE_FILES
from pipelines.report.compression import CompressionView
from pipelines.select import Candidate as Selectable
from pipelines.select import select
from pipelines.stages import files as stage_files
from pipelines.verification.latency_result import Rounds, read_rounds, spoils
from pipelines.workshop import Made

if TYPE_CHECKING:
    from pipelines.compress.summary import Compression

PACKAGES = (
    *("planish", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu"),
    *("triton", "tensorrt", "tensorrt-cu13", "tensorrt-rtx-cu13"),
    *("openvino", "torchao", "optimum", "accelerate", "tokenizers", "safetensors", "numpy", "scipy"),
)
GOLDEN_BYTES = 24_000_000
"""Parity cases that a bundle carries: the small ones, up to so many bytes."""
Files = dict[str, Path | bytes]


@dataclass(frozen=True)
class Results:
    """Everything that a run found."""

    name: str
    task: str
    source: Source
    recipe: dict[str, Any]
    recorded: Made
    artifacts: Artifacts
    variants: Sequence[Judged]
    race: Mapping[str, Any]
    points: Sequence[str]
    timeline: Sequence[Mapping[str, Any]]
    origin: Source
    """What the recipe names; `source` is what was exported, which is another model where the recipe compresses."""
    compression: Compression | None = None

    @property
    def spec(self) -> str:
        """The source as the user wrote it, without the folders that lead to it."""
        return Path(self.origin.spec).name if Path(self.origin.spec).is_absolute() else self.origin.spec


def planish_version() -> str:
    """Which version of Planish makes this, as the manifest has it."""
    return package_version("planish") or "0"


def environment() -> dict[str, Any]:
    """The machine, and the packages that results depend on."""
    versions = {name: package_version(name) for name in PACKAGES}
    return {**probe(), "packages": {name: found for name, found in versions.items() if found}}


def selection(results: Results) -> dict[str, str | None]:
    """The variant for each operating point and overall."""
    passed = [
        Selectable(judged.candidate.variant, judged.candidate.portable, _rounds(judged.timing))
        for judged in results.variants
        if judged.status[0] == "passed" and judged.runs_here
    ]
    race = results.race
    timings = {**race.get("baselines", {}), **race.get("variants", {})}
    baseline = _rounds(timings.get(race.get("baseline"), {}))
    return select(passed, results.points, baseline, seed=results.recipe["seed"])


def _rounds(timing: Mapping[str, Any]) -> dict[str, Rounds]:
    return {label: read_rounds(point) for label, point in timing.get("points", {}).items()}


def _points(timing: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A variant's figures at each point, without the rounds behind them, which the evidence has."""
    points = timing.get("points", {})
    return {label: {k: v for k, v in point.items() if k != "rounds_ms"} for label, point in points.items()}


def bundle_files(results: Results, selected: Mapping[str, str | None]) -> tuple[Files, dict[str, tuple[str, ...]]]:
    """What goes into the bundle, by path, and each variant's files."""
    chosen = set(selected.values())
    keep_all = results.recipe["keep"] == "all"
    contents: Files = {}
    owned: dict[str, tuple[str, ...]] = {}
    for judged in results.variants:
        variant = judged.candidate.variant
        if judged.artifact is None or (judged.gates["parity"]["verdict"] == "failed" and judged.candidate.skip):
            continue
        names = [_place(judged, path) for path in judged.files]
        portable_fp32 = names[:1] == [PORTABLE_FILES["onnx-fp32"]]
        # Nobody can choose what was built for other machines here; it is what the recipe names these for.
        if keep_all or variant.id in chosen or portable_fp32 or judged.candidate.ahead:
            for name, path in zip(names, judged.files, strict=True):
                if contents.setdefault(name, path) != path:
                    raise InternalError("two files of a bundle would have the same name", f"{name}: {path}")
            owned[variant.id] = tuple(names)
    for name, artifact in _portable(results, keep_all):
        contents.setdefault(name, artifact)
    source = results.source
    if source.files_folder is not None:
        # An ONNX source is in the bundle anyway: its weights are the graph's.
        weights = source.weights if results.recipe["include_source"] and source.is_folder else ()
        contents.update({name: source.files_folder / name for name in (*source.files, *weights)})
    golden = results.recorded.folder
    contents.update(_golden(golden))
    return contents, owned


def _portable(results: Results, keep_all: bool) -> list[tuple[str, Path]]:
    """Portable files that no variant of this run owns, such as the FP32 graph of a run without ONNX Runtime."""
    found = []
    for ingredient, place in PORTABLE_FILES.items():
        artifact = results.artifacts.ready.get(ingredient)
        if artifact is not None and (keep_all or ingredient == "onnx-fp32"):
            found.append((place, artifact.path))
            data = artifact.path.with_name(external_data_name(artifact.path))
            if data.is_file():
                found.append((f"{Path(place).parent}/{data.name}", data))
    return found


def _place(judged: Judged, path: Path) -> str:
    portable = PORTABLE_FILES.get(judged.candidate.ingredient)
    artifact = judged.artifact
    # An engine that was built ahead lies elsewhere than the graph that its numbers were looked at in.
    if (
        portable is not None
        and artifact is not None
        and artifact.format == "onnx"
        and path.parent == artifact.path.parent
    ):
        return f"{Path(portable).parent}/{path.name}"
    variant = judged.candidate.variant
    return f"variants/{get_target(variant.target).opened(variant).id}/{path.name}"


def _golden(recorded: Path) -> Files:
    """Small parity cases with the original's outputs, noise floors, and rows with the original's predictions."""
    entries = json.loads((recorded / "cases" / stage_files.CASES).read_text(encoding="utf-8"))
    size = {entry["file"]: (recorded / "cases" / entry["file"]).stat().st_size for entry in entries}
    kept: list[dict[str, Any]] = []
    room = GOLDEN_BYTES
    for entry in sorted(entries, key=lambda entry: size[entry["file"]]):
        if size[entry["file"]] <= room or not kept:
            kept.append(entry)
            room -= size[entry["file"]]
    names = {entry["name"] for entry in kept}
    kept = [entry | ({} if entry["partner"] in names else {"partner": None, "row": None}) for entry in kept]
    kept.sort(key=lambda entry: entry["file"])
    found: Files = {
        f"evidence/golden/cases/{stage_files.CASES}": (json.dumps(kept, indent=1) + "\n").encode(),
        f"evidence/golden/{stage_files.FLOORS}": recorded / stage_files.FLOORS,
    }
    for entry in kept:
        found[f"evidence/golden/cases/{entry['file']}"] = recorded / "cases" / entry["file"]
    rows = recorded / stage_files.GOLDEN
    for path in sorted(p for p in rows.rglob("*") if p.is_file()):
        found[f"evidence/golden/quality/{path.relative_to(rows).as_posix()}"] = path
    for path in sorted((recorded / "points").iterdir()) if (recorded / "points").is_dir() else []:
        found[f"evidence/golden/points/{path.name}"] = path
    return found


def manifest(results: Results, selected: Mapping[str, str | None], owned: Mapping[str, tuple[str, ...]]) -> Manifest:
    """``planish.json``, without its list of files."""
    record = results.recorded.record
    contract = InputContractEntry.model_validate({**record["signature"], **record["contract"]})
    source = results.origin
    return Manifest(
        planish_version=planish_version(),
        name=results.name,
        task=results.task,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        source=SourceEntry.model_validate(
            {
                "kind": source.kind,
                "digest": source.digest,
                "licence": source.licence,
                "spec": results.spec,
                "parameters": record["parameters"],
                "weights_bytes": source.weights_bytes,
            }
        ),
        recipe=results.recipe,
        input_contract=contract,
        variants=tuple(_entry(judged, owned.get(judged.candidate.variant.id, ())) for judged in results.variants),
        selected=dict(selected),
        compression=None if results.compression is None else results.compression.document,
        environment={**environment(), "busy_elsewhere": results.race.get("busy_elsewhere")},
    )


def _entry(judged: Judged, files: tuple[str, ...]) -> VariantEntry:
    variant = judged.candidate.variant
    status, reason = judged.status
    timing = judged.timing
    return VariantEntry.model_validate(
        {
            "id": variant.id,
            "target": variant.target,
            "precision": variant.precision,
            "form": variant.form,
            "files": files,
            "status": status,
            "reason": reason,
            "gates": {name: _brief(gate) for name, gate in judged.gates.items()},
            "executed": judged.executed,
            "points": {k: PointEntry.model_validate(v) for k, v in _points(timing).items()},
            "peak_rss_bytes": timing.get("peak_rss_bytes"),
            "energy_j": timing.get("energy_j"),
            "energy_reason": timing.get("energy_reason") or ("" if timing else "not timed"),
        }
    )


def _brief(gate: Mapping[str, Any]) -> dict[str, Any]:
    """A gate without the long lists, which the evidence has."""
    return {key: value for key, value in gate.items() if key not in ("cases", "consistency", "also")}


def evidence(results: Results) -> Files:
    """The evidence files: every gate's full record."""
    gates = {
        name: {v.candidate.variant.id: v.gates.get(name) for v in results.variants} for name in ("parity", "quality")
    }
    documents = {
        "parity": gates["parity"],
        "quality": {"data": results.recorded.record["data"], "variants": gates["quality"]},
        "latency": dict(results.race),
        "precision": {
            place: results.artifacts.precision[ingredient]
            for ingredient, place in PORTABLE_FILES.items()
            if ingredient in results.artifacts.precision
        }
        | {
            v.candidate.variant.id: results.artifacts.precision[v.candidate.ingredient]
            for v in results.variants
            if v.candidate.ingredient in results.artifacts.precision and v.candidate.ingredient not in PORTABLE_FILES
        },
        "passes": results.artifacts.passes,
    }
    files: Files = {f"evidence/{name}.json": to_json(document) for name, document in documents.items()}
    if results.compression is not None:
        files["evidence/compression.json"] = to_json(results.compression.evidence)
    if (learned := results.artifacts.calibration) is not None:
        files["evidence/calibration.json"] = learned.folder / learned.record["path"]
    return files


def _calibrated(results: Results) -> dict[str, Any]:
    """What the report says about calibration data; nothing where no range was learned."""
    learned = results.artifacts.calibration
    if learned is None:
        return {}
    record = learned.record["record"]
    note = "; ".join([f"ranges of {record['tensors']} tensors", *record["notes"]])
    return {"calibration": {"origin": record["origin"], "rows": record["samples"], "labelled": None, "note": note}}


def to_json(document: Any) -> bytes:
    return (json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def report(results: Results, written: Manifest, sizes: Mapping[str, int]) -> dict[str, Any]:
    """``report.json``: the manifest's content with everything that the page shows beside it."""
    record = results.recorded.record
    document = written.model_dump(mode="json", exclude={"files", "manifest_sha256"})
    by_id = {judged.candidate.variant.id: judged for judged in results.variants}
    for entry in document["variants"]:
        judged = by_id[entry["id"]]
        entry["gates"] = judged.gates
        entry["bytes"] = sum(sizes[name] for name in entry["files"] if name in sizes) or None
        entry["points"] = _points(judged.timing)
        entry["device"] = judged.timing.get("device") or {}
    if results.compression is not None:
        document["compression"] |= {"steps": brief_steps(results.compression.evidence["steps"])}
    race = results.race
    limit = results.recipe["parity"]["samples"]
    return {
        **document,
        "verdict": {
            "ok": written.selected.get("overall") is not None and not _lost_too_much(written),
            "selected": dict(written.selected),
            "sentence": sentence(written, results.race),
        },
        "data": {
            "evaluation": {**record["data"], "note": f"quality on all rows, parity on up to {limit} of them"},
            **_calibrated(results),
        },
        "baselines": {
            name: {**timing, "points": _points(timing)} for name, timing in race.get("baselines", {}).items()
        },
        "latency": {
            key: race[key]
            for key in ("baseline", "threads", "affinity", "rounds", "min_block_ms", "points", "seconds", "notes")
            if key in race
        }
        # Also where nothing was timed: that may be why.
        | {"dropped_points": record["dropped_points"]},
        "passes": [
            {**one, "pipeline": FUSED if ingredient == FUSED else "portable"}
            for ingredient, made in results.artifacts.passes.items()
            for one in made["passes"]
        ],
        "precision": {
            judged.candidate.variant.id: results.artifacts.precision[judged.candidate.ingredient]
            for judged in results.variants
            if judged.candidate.ingredient in results.artifacts.precision
        },
        "timeline": sorted(results.timeline, key=lambda stage: stage["start_s"]),
    }


def _lost_too_much(written: Manifest) -> bool:
    """As `pipelines.runner.outcome` has it: what was converted well is not to be shipped all the same."""
    return written.compression is not None and CompressionView(written.compression, (), None).failed


def sentence(written: Manifest, race: Mapping[str, Any]) -> str:
    """The verdict in a sentence; without figures where other programs kept the machine busy while it was timed.

    Where the recipe compresses, it tells what was selected against the teacher.

    Args:
        written: The manifest.
        race: What the measurement found, see `LatencyResult.to_dict`; empty where there was none.
    """
    overall = written.selected.get("overall")
    if overall is None:
        return "Do not ship: no variant passed its gates"
    if written.compression is not None:
        return CompressionView(written.compression, (), overall).sentence()
    passed = f"Ship {overall}: it passed its gates"
    variant = next(entry for entry in written.variants if entry.id == overall)
    if not variant.points:
        return f"{passed}; its latency was not measured"
    busy, baseline = race.get("busy_elsewhere"), str(race.get("baseline", EAGER))
    if spoils(busy):
        # Programs that take turns on the processors can hold one session up a thousand times longer than another.
        return (
            f"{passed}. How fast it is was not to be seen: other programs took {busy:.0%} of the processors while it "
            "was timed. Time it again on an idle machine, with --overwrite"
        )
    points = [(label, p.speedup) for label, p in variant.points.items() if p.speedup is not None]
    if not points:
        return f"{passed}. It was timed, but what it is compared with was not: {label(baseline)} failed"
    if baseline == overall:
        return f"{passed}, and no variant is faster for certain"
    best = max(points, key=lambda item: item[1])
    least = min(points, key=lambda item: item[1])
    shown = best[0].replace("x", " × ")
    if len(points) == 1:
        return f"Ship {overall}: {best[1]:.2f}× the speed of {label(baseline)} at {shown}"
    return f"Ship {overall}: {least[1]:.2f}× to {best[1]:.2f}× the speed of {label(baseline)} (most at {shown})"
