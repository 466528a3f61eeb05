"""Operating points: which of them a model takes, and inputs of their shape."""

from __future__ import annotations

import numpy as np

from exporter.artifact import Axis, InputContract, Signature, TensorSpec
from pipelines.routing import batch_and_length
from pipelines.stages.record import point_inputs, usable_points

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
