"""What the commands do: call the library, print the result, say what it is worth as an exit status."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.errors import RequestError
from pipelines.baselines import label
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

    found = verify(bundle, against=against, latency=latency, trust=trust, progress=Progress(quiet=quiet))
    if as_json:
        print(json.dumps(found.to_dict()))
        return 0 if found.ok else 1
    for difference in found.differences:
        print(f"{difference.kind}: {difference.path}" + (f" ({difference.detail})" if difference.detail else ""))
    if found.differences:
        print(f"{bundle} is not as it was written: nothing in it was opened", file=sys.stderr)
        return 1
    _print_variants(found.variants, found.latency)
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
    """Measure the latency of a bundle's variants, or of what a source would become."""
    from pipelines.manifest import MANIFEST

    asked = None if points is None else [point.strip() for point in points.split(",") if point.strip()]
    if (Path(subject) / MANIFEST).is_file():
        timed = _bench_bundle(Path(subject), asked, budget_s, threads, trust, quiet)
    else:
        timed = _bench_source(subject, asked, budget_s, threads, trust, quiet)
    if as_json:
        print(json.dumps(timed))
    else:
        _print_latency({**timed.get("baselines", {}), **timed.get("variants", {})}, timed)
    return 0


def _bench_bundle(
    folder: Path, points: list[str] | None, budget_s: float, threads: int | None, trust: bool, quiet: bool
) -> dict[str, Any]:
    from exporter.targets import get_target
    from pipelines.bundle import read_bundle
    from pipelines.checking import bench_bundle, trusted_digests
    from pipelines.recipe import usable_cores

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
        progress=Progress(quiet=quiet),
        points=points,
    )


def _bench_source(
    spec: str, points: list[str] | None, budget_s: float, threads: int | None, trust: bool, quiet: bool
) -> dict[str, Any]:
    from pipelines.runner import bench_source

    latency: dict[str, Any] = {"budget_s": budget_s} | ({"points": points} if points else {})
    recipe = Recipe.from_source(spec, trust=trust, latency=latency, threads=threads, precisions=["fp32"])
    return bench_source(recipe, progress=Progress(quiet=quiet))


def _print_variants(variants: Any, latency: Any) -> None:
    width = max(len(name) for name in variants)
    for name, entry in variants.items():
        print(f"{name:<{width}}  {entry['status']:<12}  {entry['reason']}")
    if latency:
        _print_latency({**latency["baselines"], **latency["variants"]}, latency)


def _print_latency(workers: dict[str, Any], record: Any) -> None:
    if not workers:
        print("nothing was timed")
        return
    points = record["points"]
    width = max(len(name) for name in workers)
    print(f"\np50 in ms (and speed-up over {label(record['baseline'])}):")
    print(" " * width + "".join(f"{point:>18}" for point in points))
    for name, timing in workers.items():
        if timing["error"]:
            print(f"{name:<{width}}  not timed: {timing['error']}")
            continue
        cells = []
        for point in points:
            found = timing["points"][point]
            ratio = "" if found["speedup"] is None else f" ({found['speedup']:.2f}x)"
            cells.append(f"{found['p50_ms']:.2f}{ratio}")
        print(f"{name:<{width}}" + "".join(f"{cell:>18}" for cell in cells))
