"""Sessions on a simulated GPU: real CUDA builds of ONNX Runtime and torch on CUDA libraries that are simulated.

What CUDA refuses, streams that run behind the host and captured graphs are as CUDA has them; kernels do nothing. So
this shows in what order, and from which threads, the runtimes are driven, where `fake_cuda` shows our own code alone.
Engines are those of `fake_tensorrt`, which compute on the simulated GPU here; around them torch is real too. It does
not show numbers of real models, nor speed: `make gpu-check` does, on a GPU. Skips before `make simulated-gpu`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.exporter.targets.simulated_cuda.process import SimulatedGpu

CLOSE = 1e-4
LOST = "not captured: CUDA failure 901: operation failed due to a previous error during capture"


@pytest.mark.parametrize(
    "kinds",
    [["onnxruntime"], ["onnxruntime", "torch"], ["onnxruntime", "tensorrt"], ["torch", "tensorrt"]],
    ids="-".join,
)
def test_sessions_run_from_several_threads_while_others_come_and_go(
    simulated_gpu: SimulatedGpu, kinds: list[str]
) -> None:
    told = simulated_gpu.run("together", kinds=kinds)
    assert told["failures"] == []
    assert told["refused"] == []
    assert told["worst"] < CLOSE
    assert told["graphs"] == ["captured", "captured"]
    assert told["came_and_went"] >= 10
    assert told["counts"]["cudaGraphInstantiate"] >= 2 * 8 + 2 * told["came_and_went"]


@pytest.mark.parametrize("kinds", [["onnxruntime"], ["onnxruntime", "torch"]], ids="-".join)
def test_without_turns_onnxruntime_fails_there_as_it_did_on_a_gpu(
    simulated_gpu: SimulatedGpu, kinds: list[str]
) -> None:
    """So it is these turns that the test above shows."""
    told = simulated_gpu.run("together", kinds=kinds, turns=False)
    assert "while another thread captures" in " ".join(told["refused"])
    assert "CUDA failure 900: operation not permitted when stream is capturing" in " ".join(told["failures"])


def test_onnxruntime_goes_on_without_graphs_after_a_capture_that_somebody_else_disturbed(
    simulated_gpu: SimulatedGpu,
) -> None:
    told = simulated_gpu.run("disturbed", kind="onnxruntime")
    assert "cudaMalloc while another thread captures" in " ".join(told["refused"])
    assert told["graphs"] == LOST
    assert told["worst"] < CLOSE
    assert told["counts"]["cudaStreamBeginCapture"] == 1


def test_what_others_allocate_disturbs_no_capture_by_torch(simulated_gpu: SimulatedGpu) -> None:
    told = simulated_gpu.run("disturbed", kind="torch")
    assert told["refused"] == []
    assert told["graphs"] == "captured"
    assert told["worst"] < CLOSE


@pytest.mark.parametrize("kind", ["onnxruntime", "torch", "tensorrt"])
def test_all_that_was_captured_and_allocated_is_freed(simulated_gpu: SimulatedGpu, kind: str) -> None:
    told = simulated_gpu.run("let_go", kind=kind)
    assert told["refused"] == []
    assert told["worst"] < CLOSE  # of what was bound too, after its session was closed
    assert told["grew"] <= 0
    assert told["counts"]["cudaGraphInstantiate"] == 12
    assert told["counts"]["cudaGraphExecDestroy"] == 12


@pytest.mark.parametrize("kind", ["onnxruntime", "torch", "tensorrt"])
def test_sessions_may_be_closed_in_finalizers_and_what_was_bound_goes_on(
    simulated_gpu: SimulatedGpu, kind: str
) -> None:
    told = simulated_gpu.run("closed_in_finalizers", kind=kind, ends=0)
    assert told["refused"] == []
    assert told["worst"] < CLOSE


def test_what_cannot_be_opened_disturbs_no_capture(simulated_gpu: SimulatedGpu) -> None:
    told = simulated_gpu.run("opened_in_vain")
    assert told["failed"] == 30
    assert told["refused"] == []
    assert told["graphs"] == "captured"


def test_many_shapes_are_captured_ever_more_rarely(simulated_gpu: SimulatedGpu) -> None:
    told = simulated_gpu.run("many_shapes")
    assert told["refused"] == []
    assert told["worst"] < CLOSE
    assert 8 < told["captured"] < 20  # of 6,000 runs in twelve shapes


def test_captures_can_be_switched_off(simulated_gpu: SimulatedGpu) -> None:
    told = simulated_gpu.run("together", kinds=["onnxruntime", "torch"], env={"PLANISH_CUDA_GRAPHS": "0"})
    assert told["failures"] == told["refused"] == []
    assert told["worst"] < CLOSE
    assert told["graphs"] == ["not captured: PLANISH_CUDA_GRAPHS is 0"] * 2
    assert told["counts"]["cudaStreamBeginCapture"] == 0


def test_the_process_ends_well_with_open_sessions_in_use(simulated_gpu: SimulatedGpu) -> None:
    for kinds in (["onnxruntime"], ["onnxruntime", "torch"]):
        assert simulated_gpu.run("left_open", kinds=kinds, ends=0)["refused"] == []


def test_a_graph_with_values_that_the_processor_computes_is_not_captured(
    simulated_gpu: SimulatedGpu, tmp_path: Path
) -> None:
    import onnx

    from exporter.artifact import Axis, Signature, TensorSpec

    body = "{ d = Det(x) y = Add(x, d) }"  # ONNX Runtime has Det on the processor alone
    model = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 20]> g (float[n, 4, 4] x) => (float[n, 4, 4] y) {body}'
    )
    onnx.save(model, tmp_path / "model.onnx")
    spec = ("float32", ("batch", 4, 4))
    signature = Signature((TensorSpec("x", *spec),), (TensorSpec("y", *spec),), (Axis("batch", 1, 8),))
    told = simulated_gpu.run(
        "placed", files=[str(tmp_path / "model.onnx")], signature=signature.to_dict(), shapes=[{"x": [1, 4, 4]}]
    )
    ((one),) = told["files"].values()
    assert one["nodes"] == {"CUDAExecutionProvider": 1, "CPUExecutionProvider": 1}
    assert one["captured"] == 0
    assert one["graphs"].startswith("not captured: ")
    assert "graph" in one["graphs"].partition(": ")[2]
    assert told["refused"] == []
