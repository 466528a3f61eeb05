from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from exporter.artifact import Artifact, Axis, InputContract, Signature, TensorSpec, Variant
from exporter.errors import RequestError
from exporter.original import original_arguments
from exporter.sources import resolve_source
from exporter.tasks import get_task
from pipelines.opening import OPENER, opening
from pipelines.verification.energy import EnergyMeter
from pipelines.verification.latency import Plan, measure
from pipelines.verification.worker import LONG_RUN_SECONDS, load_inputs, time_block
from pipelines.verification.worker_process import WorkerSpec

NO_METER = EnergyMeter((), "not wanted")


def onnx_model(path: Path, layers: int) -> Artifact:
    """A chain of matrix products, 256 wide, written to `path`."""
    weight = numpy_helper.from_array(np.eye(256, dtype=np.float32), "w")
    nodes = [
        helper.make_node("MatMul", ["x" if i == 0 else f"h{i}", "w"], ["y" if i == layers - 1 else f"h{i + 1}"])
        for i in range(layers)
    ]
    shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 256]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "chain", shapes[:1], shapes[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    specs = tuple(TensorSpec(name, "float32", ("batch", 256)) for name in ("x", "y"))
    return Artifact(path, "onnx", Signature(specs[:1], specs[1:], (Axis("batch", 1, 4096),)), InputContract())


def test_real_onnx_sessions_are_opened_in_workers_and_the_deeper_one_is_slower(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    save_file({"x": np.ones((64, 256), np.float32)}, tmp_path / "x.safetensors")
    variant = Variant("onnxruntime-cpu", "fp32")
    workers = []
    for name, layers in (("eager", 40), ("shallow", 2)):
        artifact = onnx_model(tmp_path / f"{name}.onnx", layers)
        workers.append(WorkerSpec(name, OPENER, opening(variant, artifact), threads=1, files=(artifact.path,)))
    plan = Plan(rounds=3, min_rounds=3, min_block_ms=5, host_rounds=1)
    result = measure(workers, {"64": tmp_path / "x.safetensors"}, log=tmp_path / "log", plan=plan)
    shallow = result.workers["shallow"]
    assert shallow.error is None
    assert shallow.executed["device"] == "cpu"
    assert "onnxruntime" in shallow.executed["runtime"]
    assert shallow.file_bytes == (tmp_path / "shallow.onnx").stat().st_size
    ratio = shallow.points["64"].speedup
    assert ratio is not None
    assert ratio.value > 1.5  # twenty times the work


def small_model() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    return torch.nn.Linear(8, 4), {"input": torch.zeros(2, 8)}


def test_pytorchs_baseline_is_timed_in_a_worker(tmp_path: Path) -> None:
    source = resolve_source("tests.pipelines.verification.test_worker:small_model")
    original = {"original": original_arguments(source, get_task("custom"))}
    np.savez(tmp_path / "x.npz", input=np.ones((2, 8), np.float32))
    workers = [WorkerSpec("eager", "exporter.targets.pytorch:open_eager", original, threads=1)]
    plan = Plan(rounds=3, min_rounds=3, min_block_ms=5, host_rounds=1)
    eager = measure(workers, {"2": tmp_path / "x.npz"}, log=tmp_path / "log", plan=plan).workers["eager"]
    assert eager.error is None
    assert eager.executed["runtime"] == "pytorch-eager"
    assert eager.executed["threads"] == 1
    assert eager.points["2"].runs > 1


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_inputs_come_from_either_kind_of_file(tmp_path: Path, kind: str) -> None:
    inputs = {"input_ids": np.arange(6, dtype=np.int64).reshape(2, 3), "x": np.ones((2, 1), np.float32)}
    path = tmp_path / f"inputs.{kind}"
    save_file(inputs, path) if kind == "safetensors" else np.savez(path, **inputs)
    loaded = load_inputs(path)
    assert set(loaded) == set(inputs)
    for name, array in inputs.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)


def test_inputs_that_are_missing_or_of_another_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(b"")
    for name in ("x.pkl", "y.npz"):
        with pytest.raises(RequestError):
            load_inputs(tmp_path / name)


def test_a_block_repeats_for_its_time_and_does_not_count_the_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, [0.030, *[0.004] * 100])
    block = time_block(clock.run, 0.05, NO_METER)
    assert block["times_ns"] == [4_000_000] * 13
    assert block["energy_j"] is None


def test_a_long_run_is_counted_at_once_and_is_the_whole_block(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, [LONG_RUN_SECONDS, 1.0])
    assert time_block(clock.run, 0.05, NO_METER)["times_ns"] == [int(LONG_RUN_SECONDS * 1e9)]


def test_a_run_longer_than_the_block_but_not_long_is_warmed_and_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, [0.4, 0.3, 0.3])
    assert time_block(clock.run, 0.05, NO_METER)["times_ns"] == [300_000_000]


class Clock:
    """A clock that moves only while something runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, durations_s: list[float]) -> None:
        self.now_ns = 0
        self.durations = iter(durations_s)
        monkeypatch.setattr("pipelines.verification.worker.time.perf_counter_ns", lambda: self.now_ns)

    def run(self) -> None:
        self.now_ns += round(next(self.durations) * 1e9)
