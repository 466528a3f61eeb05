"""Compare variants with eager PyTorch, `torch.compile` and other tools, in one run of our latency harness.

    python benchmarks/baselines.py BUNDLE [--source SPEC] [--precisions fp32 int8]
    python benchmarks/baselines.py --source SPEC

With a bundle its variants of these precisions (FP32 by default) that passed are timed, and with int8 among them what
ONNX Runtime's own `quantize_dynamic` makes of the bundle's portable graph; without one the source is exported into a
temporary folder. Every session is compared with the original before it is timed: a fast wrong answer is no baseline.
The table goes to the screen, and with the machine's description to ``benchmarks/results/baselines-<date>.json`` and
``.md``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporter.errors import PlanishError
    from exporter.sources import Source
    from exporter.tasks import Task
    from pipelines.bundle import Bundle

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "onnxruntime", "openvino", "onnx", "onnxscript", "onnx-ir", "numpy", "planish")
PORTABLE = "onnxruntime-cpu-fp32"
PEER_INT8 = "onnxruntime quantize_dynamic"
JOBS = "baseline_exports"  # beside this file, which is where Python looks when it runs a script


@dataclass
class Candidates:
    """What is to be timed, and what could not be made.

    Attributes:
        entries: ``name``, ``opening``, ``files`` of each session.
        failed: Name to the reason.
    """

    entries: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def main() -> int:
    arguments = _parser().parse_args()
    from exporter.errors import PlanishError

    try:
        with tempfile.TemporaryDirectory(prefix="planish-baselines-", dir=arguments.scratch) as folder:
            document = compare(arguments, Path(folder))
    except PlanishError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    text = render(document)
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = arguments.out / f"baselines-{document['date']}"
    stem.with_suffix(".json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(f"written: {stem}.json, {stem}.md", file=sys.stderr)
    return 0


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make or find the sessions, check them against the original, time them, and describe it all."""
    from exporter.hardware import probe
    from exporter.original import original_arguments
    from exporter.sources import resolve_source
    from pipelines.bundle import read_bundle
    from pipelines.processes import run_job
    from pipelines.recipe import Recipe, usable_cores

    bundle = read_bundle(arguments.bundle) if arguments.bundle else None
    spec = arguments.source or (bundle.manifest.recipe["source"] if bundle else None)
    if spec is None:
        _parser().error("give a bundle or --source")
    settings = {key: bundle.manifest.recipe[key] for key in ("export", "contract", "custom")} if bundle else {}
    recipe = Recipe(source=spec, trust=arguments.trust, **settings)
    source = resolve_source(spec, trust=recipe.trust)
    if bundle and source.digest != bundle.manifest.source.digest:
        say(f"note: the bundle was made from another source than {spec}")
    task = find_task(arguments.task, bundle, source)
    original = original_arguments(
        source,
        task,
        max_batch=recipe.export.max_batch,
        max_length=recipe.export.max_length,
        attends=recipe.contract.attends,
        custom=None if recipe.custom is None else recipe.custom.model_dump(mode="json"),
    )
    log, threads = folder / "log.txt", arguments.threads or usable_cores()

    say("running the original")
    wanted = {"original": original, "points": arguments.points, "seed": 0, "folder": str(folder / "points")}
    points = run_job(f"{JOBS}:reference", wanted, log=log, threads=threads).value
    found = of_bundle(bundle, arguments.precisions, arguments.trust) if bundle else Candidates()
    samples = [paths["inputs"] for paths in points.values()]
    if bundle is None:
        wanted = {"original": original, "samples": samples, "folder": str(folder / "ours")}
        found.entries += run_job(f"{JOBS}:ours", wanted, log=log, on_line=say).value
    make(found, "torch_onnx", {"original": original, "name": "torch.onnx.export", "folder": str(folder / "torch")}, log)
    given = {"original": original, "name": "transformers.exporters", "folder": str(folder / "transformers")}
    make(found, "transformers_onnx", given, log)
    if bundle and "int8" in arguments.precisions:
        given = {
            "artifact": bundle.artifact(PORTABLE).to_dict(),
            "name": PEER_INT8,
            "folder": str(folder / "peer-int8"),
        }
        make(found, "onnxruntime_dynamic", given, log)

    errors = check(found, points, threads, log)
    latency = time_all(found, original, points, threads, log, arguments)
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "source": source.name,
        "source_digest": source.digest,
        "task": task.name,
        "bundle": bundle.manifest.manifest_sha256 if bundle else None,
        "threads": threads,
        "machine": probe(),
        "packages": versions(),
        "opsets": {entry["name"]: entry["opsets"] for entry in found.entries if "opsets" in entry},
        "rms_relative_error": errors,
        "not_made": found.failed,
        "latency": latency,
        "precisions": list(arguments.precisions) if bundle else ["fp32"],
    }


def find_task(asked: str | None, bundle: Bundle | None, source: Source) -> Task:
    """The task that was asked for, or the bundle's, or the one that the source suggests."""
    from exporter.tasks import get_task, infer_task

    name = asked or (bundle.manifest.task if bundle else None)
    return get_task(name) if name else infer_task(source)


def of_bundle(bundle: Bundle, precisions: Sequence[str], trust: bool) -> Candidates:
    """The bundle's variants that passed; engines only where this user's cache built them, or they are trusted."""
    from exporter.digests import file_digest
    from exporter.targets import get_target
    from pipelines.opening import opening
    from pipelines.trust import trusted

    found = Candidates()
    for entry in bundle.manifest.variants:
        if entry.precision not in precisions:
            continue
        engine = not get_target(entry.target).portable
        if entry.status != "passed" or not entry.files:
            found.failed[entry.id] = f"{entry.status} in the bundle: {entry.reason or 'its files are not there'}"
        elif engine and not trust and file_digest(bundle.path_of(entry)) not in trusted():
            found.failed[entry.id] = "an engine is native code: it is opened only with --trust"
        else:
            digests = frozenset({file_digest(bundle.path_of(entry))}) if engine else frozenset()
            files = [str(path) for path in bundle.files_of(entry)]
            described = opening(entry.variant, bundle.artifact(entry), digests)
            found.entries.append({"name": entry.id, "opening": described, "files": files})
    return found


def make(found: Candidates, job: str, arguments: dict[str, Any], log: Path) -> None:
    """Have another exporter make its model, and note what it made or why it could not."""
    from exporter.errors import PlanishError
    from pipelines.processes import run_job

    say(f"exporting: {arguments['name']}")
    try:
        found.entries.append(run_job(f"{JOBS}:{job}", arguments, log=log, on_line=say).value)
    except PlanishError as error:
        found.failed[arguments["name"]] = reason_of(error)
        say(f"not made: {error}")


def reason_of(error: PlanishError) -> str:
    """An error's words for the results: without the remedy, which points at logs that are gone by then."""
    return error.what if error.value is None else f"{error.what}: {error.value}"


def check(found: Candidates, points: dict[str, Any], threads: int, log: Path) -> dict[str, dict[str, float | None]]:
    """The RMS relative error of every session to the original; one that cannot run is taken off the list."""
    import math

    from exporter.errors import PlanishError
    from pipelines.processes import run_job

    errors: dict[str, dict[str, float | None]] = {}
    for entry in list(found.entries):
        say(f"checking {entry['name']}")
        given = {"opening": entry["opening"], "threads": threads, "points": points}
        try:
            value = run_job(f"{JOBS}:error_of", given, log=log, threads=threads).value
        except PlanishError as error:
            found.failed[entry["name"]] = reason_of(error)
            found.entries.remove(entry)
        else:
            errors[entry["name"]] = {label: rms if math.isfinite(rms) else None for label, rms in value.items()}
    return errors


def time_all(
    found: Candidates,
    original: dict[str, Any],
    points: dict[str, Any],
    threads: int,
    log: Path,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """One measurement of everything, the PyTorch baselines included."""
    from pipelines.opening import OPENER
    from pipelines.verification.latency import Plan, measure
    from pipelines.verification.worker_process import WorkerSpec

    pytorch = {"eager": "open_eager", "compile": "open_compiled"}
    workers = [
        WorkerSpec(name, f"exporter.targets.pytorch:{opener}", {"original": original}, threads)
        for name, opener in pytorch.items()
    ]
    for entry in found.entries:
        files = tuple(Path(path) for path in entry["files"])
        workers.append(WorkerSpec(entry["name"], OPENER, entry["opening"], threads, files))
    inputs = {label: Path(paths["inputs"]) for label, paths in points.items()}
    plan = Plan(rounds=arguments.rounds, budget_s=arguments.budget_s)
    return measure(workers, inputs, log=log, plan=plan, on_line=say).to_dict()


def render(document: dict[str, Any]) -> str:
    """The document as Markdown."""
    latency, machine = document["latency"], document["machine"]
    workers = {**latency["baselines"], **latency["variants"]}
    timed = {name: worker for name, worker in workers.items() if worker["error"] is None}
    lines = [
        f"# Baselines: {document['source']}, {document['task']}, {', '.join(document['precisions']).upper()}",
        "",
        f"{document['date']}. {machine['cpu']['model']}, {document['threads']} threads of "
        f"{len(machine['cpu']['affinity'])} processors, {machine['memory_bytes'] / 2**30:.0f} GiB, {machine['os']}, "
        f"Python {machine['python']}.",
        "",
        ", ".join(f"{name} {version}" for name, version in document["packages"].items()) + ".",
        "",
        f"{latency['rounds']} rounds in random order, blocks of at least {latency['min_block_ms']:g} ms, one process "
        f"per session, the others stopped; {latency['busy_elsewhere']:.0%} of the processor time went elsewhere. "
        "Points are batch x sequence. Brackets hold 95 % bootstrap intervals of the paired ratio.",
    ]
    tables = (
        ("Speed-up over eager", lambda point: _ratio(point, "speedup")),
        (
            "Speed-up over the best of eager and `torch.compile`",
            lambda point: _ratio(point, "speedup_vs_best_pytorch"),
        ),
        ("Median (p99) in ms", lambda point: f"{point['p50_ms']:.2f} ({point['p99_ms']:.2f})"),
    )
    for title, cell in tables:
        rows = [[name, *(cell(worker["points"][p]) for p in latency["points"])] for name, worker in timed.items()]
        lines += ["", f"## {title}", "", *_table(["session", *latency["points"]], rows)]
    if PEER_INT8 in timed:
        peer = timed[PEER_INT8]["points"]
        rows = [
            [name, *(_directly(peer[p], worker["points"][p], latency["seed"]) for p in latency["points"])]
            for name, worker in timed.items()
            if name != PEER_INT8
        ]
        title = f"## Speed-up over `{PEER_INT8}` of the bundle's portable graph"
        lines += ["", title, "", *_table(["session", *latency["points"]], rows)]
    errors = document["rms_relative_error"]
    rows = [
        [n, *("not finite" if v[p] is None else f"{v[p]:.1e}" for p in latency["points"])] for n, v in errors.items()
    ]
    lines += [
        "",
        "## RMS relative error to the original, worst output",
        "",
        *_table(["session", *latency["points"]], rows),
    ]
    missing = document["not_made"] | {name: worker["error"] for name, worker in workers.items() if worker["error"]}
    if missing:
        lines += ["", "## Not measured", "", *(f"- {name}: {reason}" for name, reason in missing.items())]
    lines += ["", *(f"Note: {note}" for note in latency["notes"])] if latency["notes"] else []
    return "\n".join(lines)


def _ratio(point: dict[str, Any], key: str) -> str:
    if point[key] is None:
        return "–"
    return _interval(point[key], point[f"{key}_low"], point[f"{key}_high"])


def _directly(reference: dict[str, Any], point: dict[str, Any], seed: int) -> str:
    """One session over another in the rounds that they shared."""
    from pipelines.verification import latency_result

    first, second = latency_result.read_rounds(reference), latency_result.read_rounds(point)
    ratio = latency_result.compare(first, second, first, seed=seed)
    return "–" if ratio is None else _interval(ratio.value, ratio.low, ratio.high)


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    ruler = ["-" * width for width in widths]
    return [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in [head, ruler, *rows]
    ]


def versions() -> dict[str, str]:
    """The installed versions of what a figure depends on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path, help="a bundle, whose variants are timed")
    parser.add_argument("--source", help="the original; by default the one that the bundle's recipe names")
    parser.add_argument("--task", help="what the model does, where it cannot be told from the source")
    parser.add_argument("--precisions", nargs="+", default=["fp32"], help="of the bundle's variants, as fp32 int8")
    parser.add_argument("--points", nargs="+", help="operating points, as 1x16 8x128")
    parser.add_argument("--budget-s", type=float, default=240.0, help="seconds for the rounds")
    parser.add_argument("--rounds", type=int, default=40, help="at most so many rounds")
    parser.add_argument("--threads", type=int, help="compute threads; by default one for each usable processor")
    parser.add_argument(
        "--trust", action="store_true", help="open the bundle's compiled engines, which are native code"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--scratch", type=Path, help="where the temporary folder goes")
    return parser


if __name__ == "__main__":
    sys.exit(main())
