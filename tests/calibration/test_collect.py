"""Calibration passes, against the activations themselves, which are stored here as a library would."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np
import onnx
import pytest

from calibration.collect import (
    collect,
    collect_histograms,
    collect_ranges,
    make_table,
    merge_histograms,
)
from calibration.table import CalibrationTable, load_table
from exporter.errors import RequestError

TEXT = """
<ir_version: 9, opset_import: ["" : 20]>
g (float[batch, sequence, 8] x) => (float[batch, sequence, 8] y, float[batch, sequence, sequence] scores) {
  doubled = Add (x, x)
  y = Relu (doubled)
  turned = Transpose <perm = [0, 2, 1]> (x)
  scores = MatMul (y, turned)
  still = Mul (x, nothing)
  flat = Add (still, one)
  unread = Identity (flat)
  heads = Reshape (y, split)
  unread_too = Identity (heads)
}
"""
TENSORS = ("x", "doubled", "y", "scores", "flat", "heads")


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return save_graph(tmp_path / "graph.onnx")


def save_graph(path: Path, opset: int = 20) -> Path:
    model = onnx.parser.parse_model(TEXT.replace('"" : 20', f'"" : {opset}'))
    for name, value in (("nothing", 0.0), ("one", 1.5)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(value), name))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0, 0, 2, 4], np.int64), "split"))
    onnx.save(model, path)
    return path


def batches(count: int = 7) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(4)
    return [{"x": (rng.standard_normal((1 + i % 3, 3 + i, 8)) * (1 + i)).astype(np.float32)} for i in range(count)]


def stored(samples: Iterable[Mapping[str, np.ndarray]]) -> dict[str, list[np.ndarray]]:
    """Every activation of every batch: what calibration must never keep."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in TENSORS}
    for batch in samples:
        x = batch["x"]
        y = np.maximum(x + x, 0)
        values = {"x": x, "doubled": x + x, "y": y, "scores": y @ x.transpose(0, 2, 1), "flat": np.full_like(x, 1.5)}
        values["heads"] = y.reshape(*y.shape[:2], 2, 4)
        for name, value in values.items():
            found[name].append(value)
    return found


def same(a: CalibrationTable, b: CalibrationTable) -> bool:
    return a.to_dict() == b.to_dict()


def test_ranges_and_means_are_those_of_the_stored_activations(graph: Path) -> None:
    table = collect(graph, lambda: batches(), TENSORS)
    for name, arrays in stored(batches()).items():
        found = table.of(name)
        if name == "scores":  # its last axis is dynamic: no channels
            columns = np.concatenate([a.ravel() for a in arrays])[:, None]
        else:
            columns = np.concatenate([a.reshape(-1, a.shape[-1]) for a in arrays])
        assert found.count == len(columns)
        np.testing.assert_allclose(found.channel_min, columns.min(axis=0), rtol=1e-5)
        np.testing.assert_allclose(found.channel_max, columns.max(axis=0), rtol=1e-5)
        np.testing.assert_allclose(found.channel_mean, columns.mean(axis=0, dtype=np.float64), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("opset", [12, 13, 17])
def test_older_opsets_give_the_same(graph: Path, tmp_path: Path, opset: int) -> None:
    old = save_graph(tmp_path / "old.onnx", opset)
    assert same(collect(old, lambda: batches(), TENSORS), collect(graph, lambda: batches(), TENSORS))


def test_histograms_are_those_of_the_stored_activations(graph: Path) -> None:
    table = collect(graph, lambda: batches(), TENSORS)
    for name, arrays in stored(batches()).items():
        histogram, values = table.of(name).histogram, np.concatenate([a.ravel() for a in arrays])
        assert histogram is not None
        assert histogram.counts.sum() == values.size
        if name == "flat":
            continue
        expected, _ = np.histogram(values, bins=len(histogram.counts), range=(histogram.low, histogram.high))
        assert np.abs(np.cumsum(histogram.counts) - np.cumsum(expected)).max() <= 3


def test_four_processes_give_the_table_of_one_bit_for_bit(graph: Path) -> None:
    """The batches are formed first, and dealt to processes of one thread count; parts merge in any order."""
    whole = collect(graph, lambda: batches(), TENSORS)
    dealt = [batches()[i::4] for i in range(4)]
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        ranges = list(pool.map(collect_ranges, repeat(graph), dealt, repeat(TENSORS)))
        joined = ranges[3].merge(ranges[1]).merge(ranges[0].merge(ranges[2]))
        counted = list(pool.map(collect_histograms, repeat(graph), dealt, repeat(joined)))
    merged = merge_histograms(merge_histograms(counted[2], counted[0]), merge_histograms(counted[1], counted[3]))
    assert same(make_table(joined, merged), whole)


def test_table_survives_the_disk(graph: Path, tmp_path: Path) -> None:
    table = collect(graph, lambda: batches(), TENSORS, origin="here", digest="0" * 64)
    table.save(tmp_path / "a.json")
    again = load_table(tmp_path / "a.json")
    again.save(tmp_path / "b.json")
    assert same(again, table)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 1}', '{"schema_version": 99}'])
def test_damaged_table(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(RequestError, match="calibration table"):
        load_table(tmp_path / "a.json")


def test_tensor_that_never_changes_is_named(graph: Path) -> None:
    table = collect(graph, lambda: batches(), TENSORS)
    assert table.of("flat").constant
    assert not table.of("y").constant
    assert any("never changed: flat" in note for note in table.notes)


def test_one_sample_is_told(graph: Path) -> None:
    table = collect(graph, lambda: batches(1), TENSORS)
    assert table.samples == 1
    assert any("one sample alone" in note for note in table.notes)


def test_no_samples(graph: Path) -> None:
    with pytest.raises(RequestError, match="no calibration samples"):
        collect(graph, list, TENSORS)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_name_tensor_and_sample(graph: Path, value: float) -> None:
    samples = batches()
    samples[4]["x"][1, 2, 3] = value
    before = sum(len(batch["x"]) for batch in samples[:4])
    with pytest.raises(RequestError) as caught:
        collect(graph, lambda: samples, TENSORS)
    assert str(caught.value.value) == f"tensor 'x', calibration sample {before + 1}"


def test_unknown_tensor(graph: Path) -> None:
    with pytest.raises(RequestError, match="no such tensor"):
        collect(graph, lambda: batches(), ["z"])
