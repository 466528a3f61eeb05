from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from exporter.errors import InternalError
from exporter.onnx_files import load_model, save_model
from exporter.passes.checks import compare, run_model, structure
from tests.exporter.passes.builders import model

NAN, INF = np.nan, np.inf


def one(*values: float) -> list[dict[str, np.ndarray]]:
    return [{"y": np.array(values, np.float32)}]


def test_the_relative_error_is_of_norms() -> None:
    (difference,) = compare(one(3, 4), one(3, 4.5))
    assert difference.rms_relative == pytest.approx(0.1)
    assert difference.max_abs == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ((1, NAN), (1, NAN), True),
        ((1, NAN), (1, 2), False),
        ((1, 2), (1, NAN), False),
        ((1, INF), (1, INF), True),
        ((1, INF), (1, -INF), False),
        ((1, 2), (1, INF), False),
        ((NAN, INF), (INF, NAN), False),
    ],
)
def test_nan_and_infinities_must_be_at_the_same_places(
    left: tuple[float, ...], right: tuple[float, ...], same: bool
) -> None:
    (difference,) = compare(one(*left), one(*right))
    assert difference.same_special is same
    assert (difference.rms_relative == 0) is same


def test_shapes_types_and_integers_must_agree_exactly() -> None:
    for a, b in (
        (np.ones(2, np.float32), np.ones((2, 1), np.float32)),
        (np.ones(2, np.float32), np.ones(2, np.float64)),
        (np.array([1, 2]), np.array([1, 3])),
    ):
        (difference,) = compare([{"y": a}], [{"y": b}])
        assert not difference.same_special
    (difference,) = compare(one(0, 0), one(0, 1e-9))
    assert difference.rms_relative == INF


def test_the_worst_sample_counts() -> None:
    (difference,) = compare(one(1, 1) + one(1, 1), one(1, 1) + one(1, 2))
    assert difference.rms_relative > 0.5


def test_weights_run_from_their_file_and_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((30, 20)).astype(np.float32)
    text = "g (float[n, 30] x) => (float[n, 20] y) { y = MatMul (x, w) }"
    file = save_model(model(text, w=weight), tmp_path / "elsewhere" / "m.onnx", external_data=True)
    folder = tmp_path / "checks"
    folder.mkdir()
    sample = {"x": np.ones((2, 30), np.float32), "unused": np.ones(1)}
    for graph in (model(text, w=weight), load_model(file)):
        before = structure(graph)
        (result,) = run_model(graph, [sample], folder)
        np.testing.assert_allclose(result["y"], sample["x"] @ weight, rtol=1e-5, atol=1e-5)
        assert structure(graph) == before
        assert list(folder.iterdir()) == []


def test_a_graph_that_cannot_run_says_so(tmp_path: Path) -> None:
    graph = model("g (float[n, 2] x, float[m, 2] z) => (float[p, 2] y) { y = Add (x, z) }")
    sample = {"x": np.ones((2, 2), np.float32), "z": np.ones((3, 2), np.float32)}
    with pytest.raises(InternalError, match="cannot run the graph"):
        run_model(graph, [sample], tmp_path)
