"""Dynamic int8: standard operators, one quantization per activation, and integer kernels in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calibration.quantize.dynamic import quantize_dynamic
from exporter.artifact import Artifact, Axis, InputContract, Signature, TensorSpec, Variant
from exporter.errors import NotApplicableError, RequestError
from exporter.targets import get_target
from exporter.targets.onnxruntime import kernels_that_run

from .conftest import batches, rms, run

LINEAR = ["MatMul_q0", "MatMul_k0", "MatMul_v0", "MatMul_o0", "MatMul_up0", "MatMul_down0"]


@pytest.mark.parametrize("per_channel", [True, False])
def test_result_is_near_the_original(encoder: Path, tmp_path: Path, per_channel: bool) -> None:
    out = tmp_path / "int8.onnx"
    record = quantize_dynamic(encoder, out, per_channel=per_channel)
    assert [entry["node"] for entry in record["quantized"]] == LINEAR
    for batch in batches(4, seed=8):
        assert 1e-4 < rms(run(out, batch)[0], run(encoder, batch)[0]) < 0.03


def test_only_standard_operators_and_no_float_weight(encoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "int8.onnx"
    quantize_dynamic(encoder, out)
    model = onnx.load(out)
    assert {node.domain for node in model.graph.node} == {""}
    assert {entry.domain for entry in model.opset_import} == {""}
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert not {"wq", "wk", "wv", "wo", "wu", "wd"} & set(stored)
    assert stored["wq_quantized"].dtype == np.int8
    assert stored["wq_scale"].shape == (32,)


def test_activation_is_quantized_once(encoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "int8.onnx"
    quantize_dynamic(encoder, out)
    sources = [node.input[0] for node in onnx.load(out).graph.node if node.op_type == "DynamicQuantizeLinear"]
    assert sorted(sources) == ["active", "joined", "normed", "residual"]


def test_onnxruntime_runs_the_products_on_integers(encoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "int8.onnx"
    quantize_dynamic(encoder, out)
    kernels = kernels_that_run(out)
    assert kernels["MatMulIntegerToFloat"] + kernels["DynamicQuantizeMatMul"] == len(LINEAR)
    assert kernels["MatMul"] + kernels["FusedMatMul"] == 2  # attention: two activations


def test_session_tells_what_ran(encoder: Path, tmp_path: Path) -> None:
    axes = (Axis("batch", 1, 8), Axis("sequence", 1, 64))
    spec = TensorSpec("x", "float32", ("batch", "sequence", 32))
    signature = Signature((spec,), (TensorSpec("y", "float32", spec.shape),), axes)
    out = tmp_path / "int8.onnx"
    quantize_dynamic(encoder, out)
    told = {}
    for path in (out, encoder):
        artifact = Artifact(path, "onnx", signature, InputContract())
        session = get_target("onnxruntime-cpu").open(artifact, Variant("onnxruntime-cpu", "int8", "dynamic"), threads=1)
        told[path] = session.executed()
    assert told[out]["precision"] == "int8"
    assert sum(told[out]["integer_kernels"].values()) == len(LINEAR)
    assert told[encoder]["precision"] == "fp32"  # asked for int8, and not given


def test_kept_nodes_stay(encoder: Path, tmp_path: Path) -> None:
    record = quantize_dynamic(encoder, tmp_path / "a.onnx", keep=["MatMul_q0"])
    assert [entry["node"] for entry in record["kept"]] == ["MatMul_q0"]
    assert len(record["quantized"]) == len(LINEAR) - 1


def test_unknown_node_to_keep(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="not in the graph"):
        quantize_dynamic(encoder, tmp_path / "a.onnx", keep=["nowhere"])


def test_nothing_to_quantize(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(NotApplicableError, match="nothing in the graph can be quantized"):
        quantize_dynamic(encoder, tmp_path / "a.onnx", keep=LINEAR)


def test_same_input_same_bytes(encoder: Path, tmp_path: Path) -> None:
    for name in "ab":
        quantize_dynamic(encoder, tmp_path / f"{name}.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
