"""Compression alone: the steps of a recipe, and the model that they leave as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exporter.errors import RequestError
from pipelines.cache import Cache
from pipelines.compress.launched import Ranks, join, leave
from pipelines.compress.placing import free_place, put
from pipelines.compress.ranks import is_first, is_launched
from pipelines.compress.run import Compressed, compress
from pipelines.progress import Progress
from pipelines.recipe import Recipe

__all__ = ["compress_recipe"]


def compress_recipe(
    recipe: Recipe, out: Path, *, use_cache: bool = True, progress: Progress | None = None
) -> dict[str, Any]:
    """Run the steps of a recipe and write the model that the last of them leaves.

    Started by ``accelerate launch`` or ``torchrun`` its processes train together; the first of them writes. Several
    machines need the same cache (``PLANISH_CACHE``) on a file system that all of them see.

    Args:
        recipe: Has `compress.steps`.
        out: A folder that is not there yet, or is empty.
        use_cache: Read and keep steps.
        progress: Tells how it goes.

    Returns:
        ``model`` (the folder) and ``steps``: for each ``name``, ``title``, ``seconds`` and ``record``.

    Raises:
        RequestError: There are no steps, `out` is taken, or anything that a step finds wrong.
    """
    from pipelines.runner import named, workshop

    if not recipe.compress.steps:
        raise RequestError("the recipe has no steps to compress by", recipe.source, "Give compress.steps")
    launched = is_launched()
    if is_first():
        free_place(out)
    progress = progress or Progress(quiet=True)
    if launched:
        join()
        progress = progress if is_first() else Progress(quiet=True)
    recipe, source = named(recipe)
    with Cache() if use_cache else Cache.disabled() as cache:
        shop = workshop(cache, progress, recipe, source)
        if launched:
            shop = Ranks(shop.cache, shop.progress, shop.log, shop.threads)
        try:
            done = compress(shop, recipe, recipe.resolved(), source)
        finally:
            if launched:
                leave()
        if is_first():
            _write(done, out)
    return {"model": str(out), "steps": [_told(hop) for hop in done.hops if hop.kind != "source"]}


def _told(hop: Any) -> dict[str, Any]:
    return {"name": hop.name, "title": hop.title, "seconds": hop.seconds, "record": hop.record}


def _write(done: Compressed, out: Path) -> None:
    source = done.source
    if source.path is None:
        raise RequestError("the compressed model has no folder", source.spec)
    put(source.path, out)
