"""What the commands do: call the library, print the result, say what it is worth as an exit status."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.errors import GateError, RequestError
from pipelines.progress import Progress
from pipelines.recipe import Recipe

if TYPE_CHECKING:
    from pipelines.bundle import Bundle


def export_recipe(
    source: str, task: str | None, data: Path | None, columns: list[str], overrides: list[str], trust: bool
) -> Recipe:
    """The default recipe for a source, with what the options of ``planish export`` say."""
    fields: dict[str, Any] = {"trust": trust}
    if task is not None:
        fields["task"] = task
    section: dict[str, Any] = {}
    if data is not None:
        section["evaluation"] = str(data)
    if columns:
        section["columns"] = dict(_column(item) for item in columns)
    if section:
        fields["data"] = section
    return Recipe.from_source(source, overrides=overrides, **fields)


def _column(item: str) -> tuple[str, str]:
    role, equals, name = item.partition("=")
    if not equals or not role or not name:
        raise RequestError("a column is not given as ROLE=NAME", item, "As in --column text=sentence")
    return role, name


def run_recipe(recipe: Recipe, out: Path | None, overwrite: bool, no_cache: bool, as_json: bool, quiet: bool) -> int:
    """Run, print the table, and return the exit status."""
    from pipelines.runner import outcome, run

    bundle = run(recipe, out=out, overwrite=overwrite, use_cache=not no_cache, progress=Progress(quiet=quiet))
    problem = outcome(bundle)
    show(bundle, as_json)
    if problem is None:
        return 0
    if not as_json:
        print(f"error: {problem}", file=sys.stderr)
    return problem.exit_status


def show(bundle: Bundle, as_json: bool) -> None:
    """The result of a run on stdout: its report as JSON, or as a table."""
    document = json.loads((bundle.path / "report.json").read_text(encoding="utf-8"))
    if as_json:
        print(json.dumps({"bundle": str(bundle.path), **document}))
        return
    from rich.console import Console

    from pipelines.table import render_table

    render_table(document, Console())
    print(f"\nBundle: {bundle.path}    Report: {bundle.path / 'report.html'}")


def verify_bundle(bundle: Path, against: str | None, latency: bool, trust: bool, as_json: bool, quiet: bool) -> int:
    """Check a bundle again; 1 where anything differs."""
    from pipelines.checking import verify
    from pipelines.cli.checked import show_latency, show_variants

    found = verify(bundle, against=against, latency=latency, trust=trust, progress=Progress(quiet=quiet))
    if as_json:
        print(json.dumps(found.to_dict()))
        return 0 if found.ok else 1
    for difference in found.differences:
        print(f"{difference.kind}: {difference.path}" + (f" ({difference.detail})" if difference.detail else ""))
    if found.differences:
        print(f"{bundle} is not as it was written: nothing in it was opened", file=sys.stderr)
        return 1
    show_variants(found.variants)
    if found.latency:
        print()
        show_latency(found.latency)
    if found.source is not None:
        print(f"source   {found.source['verdict']}: {found.source['reason']}")
    failed = any(entry["status"] == "failed" for entry in found.variants.values())
    why = "something that had passed fails here" if failed else "it does not agree with the source"
    print(f"{bundle}: " + ("verified" if found.ok else f"NOT verified: {why}"))
    return 0 if found.ok else 1


def bench_subject(
    subject: str,
    points: str | None,
    budget_s: float,
    threads: int | None,
    trust: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Measure the latency of a bundle's variants, or of what a source would become; 1 where there is no comparison."""
    from pipelines.cli.checked import show_latency
    from pipelines.manifest import MANIFEST

    asked = None if points is None else [point.strip() for point in points.split(",") if point.strip()]
    if asked == []:
        raise RequestError("no operating point is given", repr(points), "As in --points 1x16,8x128, or leave it out")
    if (Path(subject) / MANIFEST).is_file():
        timed = _bench_bundle(Path(subject), asked, budget_s, threads, trust, quiet)
    else:
        timed = _bench_source(subject, asked, budget_s, threads, trust, quiet)
    if as_json:
        print(json.dumps(timed))
    else:
        show_latency(timed)
    problem = untimed(timed, subject)
    if problem is None:
        return 0
    if not as_json:
        print(f"error: {problem}", file=sys.stderr)
    return problem.exit_status


def untimed(timed: Mapping[str, Any], subject: str) -> GateError | None:
    """Why a measurement tells nothing, or ``None``: what the others are compared with was timed."""
    from pipelines.baselines import label
    from pipelines.cache import log_folder

    workers = {**timed.get("baselines", {}), **timed.get("variants", {})}
    if not workers:
        return GateError("nothing was timed", subject, "planish inspect and planish doctor say what can run here")
    reference = timed["baseline"]
    if reason := workers[reference]["error"]:
        return GateError(
            "what speed-ups are over was not timed", f"{label(reference)} ({reason})", f"The logs are in {log_folder()}"
        )
    return None


def _bench_bundle(
    folder: Path, points: list[str] | None, budget_s: float, threads: int | None, trust: bool, quiet: bool
) -> dict[str, Any]:
    from exporter.targets import get_target
    from pipelines.bundle import check_integrity, read_bundle
    from pipelines.checking import bench_bundle, trusted_digests
    from pipelines.recipe import usable_cores

    progress = Progress(quiet=quiet)
    with progress.step("Check every file"):
        differences = check_integrity(folder)
    if differences:
        shown = "; ".join(str(difference) for difference in differences[:5])
        more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise GateError("the bundle is not as it was written", shown + more, "Make it again, or get it again")
    bundle = read_bundle(folder)
    names = [
        entry.id
        for entry in bundle.manifest.variants
        if entry.status == "passed" and entry.files and get_target(entry.target).availability(entry.variant).available
    ]
    return bench_bundle(
        bundle,
        names,
        trusted_digests(bundle, trust),
        threads=threads or usable_cores(),
        budget_s=budget_s,
        progress=progress,
        points=points,
    )


def _bench_source(
    spec: str, points: list[str] | None, budget_s: float, threads: int | None, trust: bool, quiet: bool
) -> dict[str, Any]:
    from pipelines.runner import bench_source

    latency: dict[str, Any] = {"budget_s": budget_s} | ({"points": points} if points else {})
    recipe = Recipe.from_source(spec, trust=trust, latency=latency, threads=threads, precisions=["fp32"])
    return bench_source(recipe, progress=Progress(quiet=quiet))
