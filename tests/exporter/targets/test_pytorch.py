from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter.errors import EnvironmentLackError, RequestError
from exporter.original import open_described, original_arguments
from exporter.sources import resolve_source
from exporter.targets import pytorch, targets
from exporter.targets.pytorch import ProgramSession, open_compiled, open_eager
from exporter.tasks import infer_task
from exporter.torch_export import export_program
from tests.exporter.targets.fake_cuda import FakeCuda

Folders = Callable[..., Path]


@pytest.fixture(autouse=True)
def threads_as_before() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def arguments(model_folder: Folders) -> dict[str, Any]:
    source = resolve_source(str(model_folder("bert")))
    return {"original": original_arguments(source, infer_task(source))}


def inputs_of(arguments: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in open_described(arguments["original"]).example.items()}


@pytest.mark.parametrize("opener", [open_eager, open_compiled])
def test_where_torch_has_no_gpu_a_baseline_on_one_says_what_is_missing(opener: Any, arguments: dict[str, Any]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(EnvironmentLackError, match=r"torch was built without CUDA|torch finds no GPU"):
        opener({**arguments, "device": "cuda"}, threads=1)


def test_eager_is_the_original(arguments: dict[str, Any]) -> None:
    session = open_eager(arguments, threads=1)
    inputs = inputs_of(arguments)
    wanted = open_described(arguments["original"]).run(inputs)
    found = session.run(inputs)
    assert list(found) == ["last_hidden_state", "sentence_embedding"]
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)
    told = session.executed()
    assert (told["runtime"], told["precision"], told["threads"]) == ("pytorch-eager", "fp32", 1)
    assert told["attention"] == "sdpa"


def test_a_program_is_run_as_it_is_and_its_inputs_are_checked(arguments: dict[str, Any], tmp_path: Path) -> None:
    original = open_described(arguments["original"])
    artifact = export_program(original, tmp_path)
    session = ProgramSession(artifact, torch.export.load(artifact.path).module(check_guards=False), threads=1)
    inputs = inputs_of(arguments)
    for rows in (slice(None), slice(1)):  # any batch that the signature allows
        given = {name: value[rows] for name, value in inputs.items()}
        for name, value in original.run(given).items():
            np.testing.assert_allclose(session.run(given)[name], value, rtol=1e-5, atol=1e-6)
    with pytest.raises(RequestError):
        session.run({name: value.astype(np.float32) for name, value in inputs.items()})


def test_inputs_are_checked_first(arguments: dict[str, Any]) -> None:
    session = open_eager(arguments, threads=1)
    inputs = inputs_of(arguments)
    with pytest.raises(RequestError, match="out of range"):
        session.run({**inputs, "input_ids": inputs["input_ids"] + 10_000})
    with pytest.raises(RequestError, match="attends to no token"):
        session.run({**inputs, "attention_mask": inputs["attention_mask"] * 0})


@pytest.mark.parametrize(("precision", "dtype"), [("fp64", np.float64), ("fp16", np.float16), ("bf16", np.float32)])
def test_other_precisions_really_run(arguments: dict[str, Any], precision: str, dtype: type) -> None:
    session = open_eager({**arguments, "precision": precision}, threads=1)
    assert session.executed()["precision"] == precision
    inputs = inputs_of(arguments)
    wanted = open_described(arguments["original"]).run(inputs)["sentence_embedding"]
    found = session.run(inputs)["sentence_embedding"]
    assert found.dtype == dtype
    error = np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted)
    assert 0 < error < {"fp64": 1e-5, "fp16": 1e-2, "bf16": 5e-2}[precision]


def test_an_unknown_precision(arguments: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="int3"):
        open_eager({**arguments, "precision": "int3"}, threads=1)


@pytest.mark.slow
def test_compiled_agrees_with_eager_in_every_shape(arguments: dict[str, Any]) -> None:
    session = open_compiled(arguments, threads=1)
    inputs = inputs_of(arguments)
    short = {name: np.ascontiguousarray(value[:1, :5]) for name, value in inputs.items()}
    original = open_described(arguments["original"])
    before = session.executed()["graphs"]
    for given in (inputs, short, inputs):
        wanted, found = original.run(given), session.run(given)
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value, atol=2e-6)
    runs = 0

    def counting(**tensors: Any) -> Any:
        nonlocal runs
        runs += 1
        return compiled(**tensors)

    compiled, session.call = session.call, counting
    session.run(short)
    assert runs == 1, "a shape that was compiled before runs once for each run"
    told = session.executed()
    assert told["runtime"] == "pytorch-compile"
    assert told["graphs"] - before >= 2
    assert set(told["median_ms_at_first_shape"]) == {"free", "fixed"}
    assert told["shapes"] == min(
        told["median_ms_at_first_shape"], key=lambda name: told["median_ms_at_first_shape"][name]
    )
    assert told["graph_breaks"] == 0
    assert told["frozen"]
    if torch.backends.mkldnn.is_available() and platform.machine() == "x86_64":
        assert told["packed_weights"] > 0, "the weights were not frozen"


@pytest.mark.slow
def test_on_a_fake_gpu_the_faster_way_to_capture_is_kept(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_compiled(arguments, threads=1)
    session.device = FakeCuda()
    seconds = iter((2.0, 1.0))
    monkeypatch.setattr(pytorch, "_median_seconds", lambda binding: next(seconds))
    inputs = inputs_of(arguments)
    wanted = open_described(arguments["original"]).run(inputs)
    for name, value in session.run(inputs).items():
        np.testing.assert_allclose(value, wanted[name], atol=2e-6)
    told = session.executed()
    assert told["cuda_graphs"] == "captured"
    assert told["median_ms_at_first_shape"] == {"reduce-overhead": 2000.0, "captured": 1000.0}
    assert len(session.device.captures) == 2  # once to choose, once for the run
    other = {name: value[::-1].copy() for name, value in inputs.items()}
    for name, value in session.run(other).items():
        np.testing.assert_allclose(value, wanted[name][::-1], atol=2e-6)
    assert len(session.device.captures) == 2, "the same shapes are captured once"


def test_an_unknown_way_to_capture_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"CUDA graphs: by-hand\. Known: reduce-overhead, captured"):
        open_compiled({**arguments, "graphs": "by-hand"}, threads=1)


def test_an_onnx_source_has_no_pytorch_baseline(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, save

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "r.onnx")
    source = resolve_source(str(tmp_path / "r.onnx"))
    with pytest.raises(RequestError, match="no PyTorch form"):
        open_eager({"original": original_arguments(source, infer_task(source))}, threads=1)


def test_the_baselines_are_no_targets() -> None:
    assert not [name for name in targets() if "pytorch" in name]
