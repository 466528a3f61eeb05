"""ONNX Runtime itself, where it has no CUDA provider and would run on the processor in silence."""

from __future__ import annotations

import gc
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from exporter.artifact import Artifact, Axis, InputContract, Signature, TensorSpec, Variant
from exporter.errors import EnvironmentLackError, RequestError
from exporter.targets import get_target, onnxruntime_cuda
from exporter.targets.base import Availability
from exporter.targets.graph_session import GraphBinding
from exporter.targets.onnxruntime_cuda import (
    CUDA_PROVIDER,
    NOT_CAPTURED,
    OnnxRuntimeCuda,
    OnnxRuntimeCudaSession,
    nodes_by_provider,
    open_cuda_session,
)
from exporter.targets.shape_cache import PATIENCE
from exporter.targets.turns import TURNS, Native

ort = pytest.importorskip("onnxruntime")
SIGNATURE = Signature(
    (TensorSpec("x", "float32", ("batch", 4)),), (TensorSpec("y", "float32", ("batch", 4)),), (Axis("batch", 1, 8),)
)


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    import onnx

    if CUDA_PROVIDER in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has a CUDA provider")
    body = "<float[1] one = {1.0}> { h = Add(x, one) y = Relu(h) }"
    model = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 20]> g (float[batch, 4] x) => (float[batch, 4] y) {body}'
    )
    onnx.save(model, tmp_path / "model.onnx")
    return Artifact(tmp_path / "model.onnx", "onnx", SIGNATURE, InputContract())


@pytest.mark.parametrize("capture", [True, False])
def test_another_provider_than_cudas_is_refused_and_named(artifact: Artifact, capture: bool) -> None:
    with pytest.raises(EnvironmentLackError, match="does not run on the GPU") as caught:
        open_cuda_session(artifact.path, 1, capture=capture)
    assert caught.value.value == "CPUExecutionProvider instead"
    assert "docs/nvidia.md" in str(caught.value.remedy)


def test_neither_a_session_nor_the_target_falls_back_to_the_processor(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnnxRuntimeCuda, "availability", lambda *given: Availability(True))
    with pytest.raises(EnvironmentLackError, match="CPUExecutionProvider instead"):
        OnnxRuntimeCudaSession(artifact, "fp16", 1)
    with pytest.raises(EnvironmentLackError, match="CPUExecutionProvider instead"):
        get_target("onnxruntime-cuda").open(artifact, Variant("onnxruntime-cuda", "fp16"), threads=1)


class DisturbedOrt:
    """Stands for a session of ONNX Runtime on a GPU: one that captures, and whose capture another thread disturbs."""

    def __init__(self, capture: bool) -> None:
        self.capture = capture


def test_after_a_disturbed_capture_a_fake_session_goes_on_without(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def opens(path: Path, threads: int, *, capture: bool) -> DisturbedOrt:
        opened.append(DisturbedOrt(capture))
        return opened[-1]

    class Bound:
        def __init__(self, opened: Native, artifact: Artifact, arrays: object, number: int) -> None:
            if opened.session.capture and number != NOT_CAPTURED:
                raise RuntimeError("its names, its lines CUDA failure 901: operation failed ; GPU=0 ; hostname=…\nmore")
            self.bound = (opened.session, number)

    monkeypatch.setattr(onnxruntime_cuda, "open_cuda_session", opens)
    monkeypatch.setattr(onnxruntime_cuda, "OnnxRuntimeCudaBinding", Bound)
    session = OnnxRuntimeCudaSession(artifact, "fp32", 1)
    assert session.graphs() == "captured"
    for _ in range(2):
        assert session.bind({"x": np.zeros((2, 4), np.float32)}).bound == (opened[1], NOT_CAPTURED)
    assert [one.capture for one in opened] == [True, False]
    assert session.graphs() == "not captured: CUDA failure 901: operation failed"


def test_all_runs_of_a_fake_session_are_in_the_thread_that_captures_them(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime, which keeps graphs by thread, is pretended; threads are not."""
    seen: dict[str, set[int]] = {"captured": set(), "launched": set()}

    class Pretended(GraphBinding):
        def __init__(self, opened: object, artifact: Artifact, arrays: object, number: int, *, once: bool = False):
            self.arrays = arrays
            if number != NOT_CAPTURED:
                seen["captured"].add(threading.get_ident())

        def refill(self, arrays: Mapping[str, np.ndarray]) -> None:
            self.arrays = dict(arrays)

        def launch(self) -> None:
            seen["launched"].add(threading.get_ident())

        def wait(self) -> None:
            pass

        def queued_seconds(self, runs: int) -> float:
            return 0.0

        def outputs(self) -> dict[str, np.ndarray]:
            return {"y": self.arrays["x"] + 1}

    monkeypatch.setattr(onnxruntime_cuda, "open_cuda_session", lambda *given, capture: object())
    monkeypatch.setattr(onnxruntime_cuda, "OnnxRuntimeCudaBinding", Pretended)
    session = OnnxRuntimeCudaSession(artifact, "fp32", 1)

    def work(number: int) -> None:
        for _ in range(PATIENCE):
            given = np.full((1 + number % 2, 4), number, np.float32)
            np.testing.assert_array_equal(session.run({"x": given})["y"], given + 1)

    with ThreadPoolExecutor(4) as pool:
        for job in [pool.submit(work, number) for number in range(4)]:
            job.result(timeout=60)
    assert len(seen["captured"]) == 1
    assert seen["captured"] == seen["launched"]
    assert threading.get_ident() not in seen["launched"]
    with pytest.raises(RequestError):
        session.run({"y": np.zeros((1, 4), np.float32)})
    session.close()
    session.close()


def test_a_closed_session_says_so_and_opens_nothing_again(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr(onnxruntime_cuda, "open_cuda_session", lambda *given, capture: opened.append(capture))
    session = OnnxRuntimeCudaSession(artifact, "fp32", 1)
    session.close()
    inputs = {"x": np.zeros((1, 4), np.float32)}
    for use in (lambda: session.run(inputs), lambda: session.bind(inputs), session.executed):
        with pytest.raises(RequestError, match="the session is closed"):
            use()
    assert opened == [True]


def test_a_session_may_be_collected_while_its_thread_is_inside_the_thread_pools_lock(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector of garbage runs in the middle of anything."""
    from concurrent.futures import thread as pools

    done = threading.Event()

    class Pretended:
        def __del__(self) -> None:
            done.set()

    monkeypatch.setattr(onnxruntime_cuda, "open_cuda_session", lambda *given, capture: Pretended())
    held = [OnnxRuntimeCudaSession(artifact, "fp32", 1)]

    def collect() -> None:
        with pools._global_shutdown_lock:
            held.clear()
            gc.collect()

    collecting = threading.Thread(target=collect, daemon=True)
    collecting.start()
    collecting.join(60)
    assert not collecting.is_alive()
    assert done.wait(60)


@pytest.mark.parametrize("let_go", ["close", "forget"])
def test_a_fake_session_is_destroyed_in_a_turn_and_not_amid_a_capture(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, let_go: str
) -> None:
    """ONNX Runtime is pretended: to destroy what it captured while something else is captured ends the process."""
    destroyed: list[tuple[str, bool]] = []
    captures, done = threading.Event(), threading.Event()

    class Pretended:
        def __del__(self) -> None:
            destroyed.append((threading.current_thread().name, captures.is_set()))
            done.set()

    monkeypatch.setattr(onnxruntime_cuda, "open_cuda_session", lambda *given, capture: Pretended())
    held = [OnnxRuntimeCudaSession(artifact, "fp32", 1)]

    def forget() -> None:
        if let_go == "close":
            held[0].close()
        held.clear()
        gc.collect()

    with TURNS.capturing():
        captures.set()
        forgets = threading.Thread(target=forget)
        forgets.start()
        assert not done.wait(0.3)
        captures.clear()
    assert done.wait(60)
    forgets.join(60)
    ((thread, amid),) = destroyed
    assert thread == "planish-frees"
    assert not amid


def test_captures_can_be_switched_off(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(onnxruntime_cuda, "open_cuda_session", lambda *given, capture: asked.append(capture))
    monkeypatch.setenv("PLANISH_CUDA_GRAPHS", "0")
    session = OnnxRuntimeCudaSession(artifact, "fp32", 1)
    assert asked == [False]
    assert session.graphs() == "not captured: PLANISH_CUDA_GRAPHS is 0"


def test_a_file_that_is_no_model_is_a_readable_error(artifact: Artifact) -> None:
    artifact.path.write_bytes(artifact.path.read_bytes()[:40])
    with pytest.raises(RequestError, match="cannot open the model on the GPU") as caught:
        open_cuda_session(artifact.path, 1, capture=True)
    assert "\n" not in str(caught.value)


def test_looking_for_cudas_libraries_says_nothing_where_there_are_none(
    artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(EnvironmentLackError):
        open_cuda_session(artifact.path, 1, capture=True)
    assert capsys.readouterr().out == ""


def test_an_older_onnxruntime_without_that_is_asked_for_its_provider_all_the_same(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(ort, "preload_dlls", raising=False)
    with pytest.raises(EnvironmentLackError, match="CPUExecutionProvider instead"):
        open_cuda_session(artifact.path, 1, capture=False)


def test_nodes_are_counted_by_the_provider_that_got_them(artifact: Artifact) -> None:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = ort.InferenceSession(str(artifact.path), options, providers=["CPUExecutionProvider"])
    assert dict(nodes_by_provider(session)) == {"CPUExecutionProvider": 2}
    found = session.run(None, {"x": np.full((1, 4), -3, np.float32)})[0]
    np.testing.assert_array_equal(found, np.zeros((1, 4)))


def test_of_an_onnxruntime_without_that_list_no_placement_is_known() -> None:
    assert dict(nodes_by_provider(object())) == {}  # as an older one: it has no such method
