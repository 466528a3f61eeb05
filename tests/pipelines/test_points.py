"""Operating points: which of them a model takes, and inputs of their shape."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from exporter.artifact import Axis, InputContract, Signature, TensorSpec
from pipelines.routing import batch_and_length
from pipelines.stages.record import point_inputs, usable_points
from tests.pipelines.jobs import SMALL, settings

FRAMES = Signature(
    (TensorSpec("audio", "float32", ("batch", "frames", 5)),),
    (TensorSpec("y", "float32", ("batch", 3)),),
    (Axis("batch", 1, 16), Axis("frames", 8, 64)),
)
PICTURES = Signature(
    (TensorSpec("x", "float32", ("batch", 3, "height", "width")),),
    (TensorSpec("y", "float32", ("batch", 3)),),
    (Axis("batch", 1, 16), Axis("height", 8, 64), Axis("width", 8, 64)),
)


def test_the_only_other_axis_is_the_length_whatever_its_name() -> None:
    assert usable_points(["1x16", "4x32"], FRAMES) == (["1x16", "4x32"], [])
    samples = [{"audio": np.ones((1, 20, 5), np.float32)}]
    inputs = point_inputs("4x32", samples, FRAMES, InputContract())
    assert inputs["audio"].shape == (4, 32, 5)
    assert batch_and_length(inputs, FRAMES) == (4, 32)


def test_points_beyond_the_model_are_told() -> None:
    kept, dropped = usable_points(["1x4", "1x65", "17x16", "2", "2x64"], FRAMES)
    assert kept == ["2x64"]
    assert [line.split(":")[0] for line in dropped] == ["1x4", "1x65", "17x16", "2"]
    assert "8 to 64" in dropped[0]
    assert "'frames'" in dropped[3]


def test_with_several_lengths_or_none_the_batch_alone_counts() -> None:
    assert usable_points(["1x16", "1x32", "8x128"], PICTURES) == (["1", "8"], [])
    samples = [{"x": np.ones((1, 3, 9, 10), np.float32)}]
    inputs = point_inputs("8", samples, PICTURES, InputContract())
    assert inputs["x"].shape == (8, 3, 9, 10)
    assert batch_and_length(inputs, PICTURES) == (8, None)


RECIPE = """
source: examples.keyword_spotter:keyword_spotter
custom:
  inputs: {features: {dtype: float32, shape: [batch, 40, frames]}}
  outputs: [logits]
  axes: {batch: {max: 16}, frames: {min: 200, max: 400}}
"""


@pytest.fixture
def recipe(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that takes none of the default points."""
    monkeypatch.setenv("PLANISH_CACHE", str(cache))
    monkeypatch.setenv("COLUMNS", "300")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.mark.slow
def test_points_of_the_user_that_the_model_does_not_take_are_refused(
    recipe: Path, here: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    asked = settings("latency.points=['8', 1x20]")
    status, out, err = here("run", recipe, "--out", tmp_path / "out", *asked)
    assert (status, out) == (2, "")
    assert "none of the operating points: 8: this model needs a length too (of its axis 'frames'); 1x20: " in err
    assert "1x200" in err
    assert "Export" not in err, "it was noticed after the export"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_default_points_that_the_model_does_not_take_are_told(
    recipe: Path, here: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    asked = [part for item in SMALL if not item.startswith("latency.points") for part in ("--set", item)]
    status, out, err = here("run", recipe, "--out", tmp_path / "out", *asked)
    assert status == 0, err
    told = "Not measured at 1x16: the model takes lengths from 200 to 400; 1x32: "
    assert told in out
    assert told in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    document = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert [line.split(":")[0] for line in document["latency"]["dropped_points"]] == ["1x16", "1x32", "1x128", "8x128"]
