"""Quantized artifacts as a run makes them from a recipe's section, without judging them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporter.artifact import Artifact
from pipelines.artifacts import Artifacts, export_onnx, export_program
from pipelines.cache import Cache
from pipelines.plan import original_key
from pipelines.progress import Progress
from pipelines.quantizing import Learning, quantize
from pipelines.recipe import Recipe
from pipelines.recipe_sections import Calibration, Export
from pipelines.recording import original_of
from pipelines.runner import named
from pipelines.workshop import Workshop

DATA = {"path": None, "columns": {}, "limit": None, "split": None, "seed": 0}
SMOOTHED = ("onnx-int8-static-smooth-openvino", "pt2-int8-static-smooth")


@pytest.fixture
def shop(cache: Path, tmp_path: Path) -> Iterator[Workshop]:
    with Cache(cache) as opened:
        yield Workshop(opened, Progress(quiet=True), tmp_path / "log.txt", threads=1)


@pytest.mark.slow
def test_the_strength_of_smoothing(hostile: Path, shop: Workshop) -> None:
    """A recipe's alpha is that of every group, on ONNX graphs and on programs, and another one finds nothing cached."""
    # As the main job exports it: what other tests made of this model is in the cache.
    recipe, source = named(Recipe.from_source(str(hostile)))
    original = original_of(recipe, source)
    identity = original_key(original)
    exported = {
        "onnx-fp32": export_onnx(shop, original, identity, Export()),
        "pt2-fp32": export_program(shop, original, identity),
    }
    found: dict[float | None, dict[str, Any]] = {}
    for alpha in (None, 0.7):
        learning = Learning.of(Calibration(samples=16, smooth_alpha=alpha), 0, original, identity, DATA, DATA)
        artifacts = Artifacts()
        for name, made in exported.items():
            artifact = Artifact.from_dict(made.record["artifact"])
            artifacts.ready[name] = replace(artifact, path=made.folder / artifact.path)
            artifacts.ids[name] = made.id
        for name in SMOOTHED:
            quantize(shop, artifacts, name, learning, "auto")
        found[alpha] = {name: artifacts.precision[name]["smoothing"] for name in SMOOTHED}
        assert all(artifacts.ready[name].path.is_file() for name in SMOOTHED)
    for name in SMOOTHED:
        for alpha, told in ((alpha, told[name]) for alpha, told in found.items()):
            assert told["alpha"] == alpha
            assert told["groups"]
            assert {group["alpha"] for group in told["groups"]} == {alpha} or alpha is None
        largest = {max(group["factor_max"] for group in told[name]["groups"]) for told in found.values()}
        assert len(largest) == 2
