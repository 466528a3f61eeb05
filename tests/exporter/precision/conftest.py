"""Tiny ONNX graphs, written in ONNX's text form, and what tests ask of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from exporter.artifact import InputContract

Writer = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    """``write(text, weight=array, …)`` saves the graph ``agraph (…) => (…) {…}`` with these initializers."""

    def save(text: str, *, opset: int = 20, name: str = "model.onnx", **weights: np.ndarray) -> Path:
        model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : {opset}]>\n{text}')
        for key, array in weights.items():
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), key))
        for index, node in enumerate(model.graph.node):
            node.name = node.name or f"{node.op_type.lower()}{index}"
        path = tmp_path / name
        onnx.checker.check_model(model)
        onnx.save(model, path)
        return path

    return save


@pytest.fixture
def promise() -> InputContract:
    """A contract under which every row attends to something."""
    return InputContract(attends=True, mask="mask", id_ranges={"mask": (0, 1)})


def run(path: Path, **inputs: np.ndarray) -> list[np.ndarray]:
    """Outputs of the model in ONNX Runtime on the CPU."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def rms(a: np.ndarray, b: np.ndarray) -> float:
    """RMS relative error of `a` against `b`."""
    wide = b.astype(np.float64)
    return float(np.linalg.norm(a.astype(np.float64) - wide) / np.linalg.norm(wide))


def kept(record: dict[str, object]) -> dict[str, str]:
    """Rule by node name."""
    decisions = record["kept"]
    assert isinstance(decisions, list)
    return {d["node"]: d["rule"] for d in decisions}
