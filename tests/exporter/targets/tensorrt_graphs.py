"""Small graphs for TensorRT's builder: written, and built for a GPU that is not there."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporter.targets.tensorrt_builder import RTX, BuiltEngine, EngineOptions, build_engine

WIDTH = 8
ADA = EngineOptions(compute_capabilities=("SM89",))
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx-cu13 is not installed"
)


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, np.ndarray] | None = None,
    *,
    inputs: Sequence[str] = ("x",),
    shape: Sequence[int] = (WIDTH,),
    opset: int = 18,
) -> Path:
    """Write a graph of float inputs of this shape, a dynamic batch before it, and an output ``y``."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape]) for name in inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def product(path: Path, dtype: type = np.float32) -> Path:
    """One matrix product."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="encoder.layer.0/MatMul")
    return save(path, [node], {"w": np.ones((WIDTH, WIDTH), dtype)})


def build(path: Path, options: EngineOptions = ADA) -> BuiltEngine:
    """Build what `save` wrote, for batches of 1 to 64."""
    model = onnx.load(path)
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim][1:] for value in model.graph.input
    }
    profile = {name: ((1, *shape), (8, *shape), (64, *shape)) for name, shape in shapes.items()}
    return build_engine(path, path.with_suffix(".plan"), module=RTX, profiles=[profile], options=options)
