"""What was changed inside, exported: shared weights are in the file once, and ONNX Runtime finds the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from exporter.onnx_export import export_onnx
from exporter.original import Original
from exporter.passes import optimize
from exporter.structure import layer_parts, remove_heads, remove_neurons, share_layers
from tests.exporter.structure.planted import Folders, assert_alike, opened, outputs, saved


def exported(original: Original, folder: Path) -> Path:
    """As a run exports: the raw graph, then the passes, each checked on an input."""
    raw = export_onnx(original, folder / "raw")
    sample = {name: tensor.numpy() for name, tensor in original.example.items()}
    optimize(raw.path, folder / "model.onnx", contract=raw.contract, samples=[sample])
    return folder / "model.onnx"


def run(path: Path, original: Original) -> dict[str, np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    values = session.run(None, {name: tensor.numpy() for name, tensor in original.example.items()})
    return {value.name: array for value, array in zip(session.get_outputs(), values, strict=True)}


def weight_elements(path: Path) -> int:
    """Of the matrices: biases of new models are all zero, and equal ones are stored once anyway."""
    return sum(int(np.prod(tensor.dims)) for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 2)


def matrix_elements(original: Original) -> int:
    return sum(p.numel() for p in original.module.parameters() if p.dim() == 2)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_shared_layers_are_in_the_onnx_file_once(model_folder: Folders, tmp_path: Path, kind: str) -> None:
    original = opened(model_folder(kind))
    full = weight_elements(exported(original, tmp_path / "full"))
    share_layers(original.module, [[0, 1]])
    again = opened(saved(original, tmp_path / "shared"))
    path = exported(again, tmp_path / "onnx")
    parts = layer_parts(again.module, 1)
    layer = sum(part.weight.numel() for part in (parts.query, parts.key, parts.value, parts.output))
    layer += parts.up.weight.numel() + parts.down.weight.numel()
    assert full - weight_elements(path) >= layer
    assert_alike(run(path, again), outputs(original), 5e-6)


@pytest.mark.parametrize("kind", ["bert-mlm", "distilbert"])
def test_a_pruned_model_is_exported_as_small_as_it_is(model_folder: Folders, tmp_path: Path, kind: str) -> None:
    original = opened(model_folder(kind))
    full = weight_elements(exported(original, tmp_path / "full"))
    before = matrix_elements(original)
    remove_heads(original.module, 0, [1, 2])
    remove_neurons(original.module, 1, list(range(20)))
    again = opened(saved(original, tmp_path / "pruned"))
    path = exported(again, tmp_path / "onnx")
    assert full - weight_elements(path) == before - matrix_elements(again)
    assert_alike(run(path, again), outputs(original), 5e-6)
