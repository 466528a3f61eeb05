"""``planish compress``: the steps of a recipe, and what each of them left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.progress import Progress
from pipelines.recipe import Recipe


def run_compression(recipe: Recipe, out: Path, no_cache: bool, as_json: bool, quiet: bool) -> int:
    """Compress, print a line for each step, and return the exit status."""
    from pipelines.compress.command import compress_recipe
    from pipelines.compress.ranks import is_first

    done = compress_recipe(recipe, out, use_cache=not no_cache, progress=Progress(quiet=quiet))
    if not is_first():
        return 0
    if as_json:
        print(json.dumps(done))
        return 0
    for step in done["steps"]:
        print(f"{step['name']:<14} {step['title']:<44} {_size(step['record']['size'])}")
    print(f"\nModel: {out}    Export it with: planish export {out}")
    return 0


def _size(size: Mapping[str, Any]) -> str:
    megabytes = "" if size.get("bytes") is None else f", {size['bytes'] / 1e6:.1f} MB"
    return f"{size['parameters'] / 1e6:.2f} million parameters{megabytes}"
