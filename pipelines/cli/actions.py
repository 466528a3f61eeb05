"""What the commands do: call the library, print the result, say what it is worth as an exit status."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.errors import RequestError
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
