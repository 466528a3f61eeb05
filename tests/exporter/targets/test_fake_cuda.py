"""Bindings and sessions of a GPU over a fake one: what is captured when, and that results are right each time."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.artifact import Artifact, Axis, InputContract, Signature, TensorSpec
from exporter.errors import EnvironmentLackError, RequestError
from exporter.targets.cuda import WARM_RUNS, Cuda
from exporter.targets.graph_session import MOST_GRAPHS, SWITCH, CudaBinding, CudaSession
from exporter.targets.shape_cache import PATIENCE
from exporter.targets.turns import TURNS, frees
from tests.exporter.targets.fake_cuda import UNWRITTEN, FakeCuda

SIGNATURE = Signature(
    (TensorSpec("x", "float32", ("batch", 2)),), (TensorSpec("y", "float32", ("batch", 2)),), (Axis("batch", 1, 64),)
)
CONTRACT = InputContract(id_ranges={"x": (-1000, 1000)})


def given(batch: int, start: float = 0.0) -> dict[str, np.ndarray]:
    return {"x": np.arange(start, start + 2 * batch, dtype=np.float32).reshape(batch, 2)}


class CountedCall:
    """Twice the input, plus one."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self.count += 1
        return {"y": 2 * inputs["x"] + 1}


class FakeSession(CudaSession):
    def __init__(self, device: FakeCuda, call: Any = None) -> None:
        super().__init__(Artifact(Path("none"), "onnx", SIGNATURE, CONTRACT), device)
        self.computed = call or CountedCall()
        self._native = self.computed

    def executed(self) -> dict[str, Any]:
        return {"runtime": "fake", "device": "cuda", "precision": "fp32", "cuda_graphs": self.graphs()}


def test_the_fake_has_the_interface_of_the_real_one() -> None:
    methods = {name: found for name, found in vars(Cuda).items() if inspect.isfunction(found) and name[0] != "_"}
    assert methods
    for name, real in methods.items():
        fake = getattr(FakeCuda, name)
        assert list(inspect.signature(fake).parameters) == list(inspect.signature(real).parameters), name
    assert {name for name in vars(FakeCuda) if name[0] != "_"} == set(methods)


def test_without_a_gpu_the_real_one_says_what_is_missing() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(EnvironmentLackError, match=r"torch was built without CUDA|torch finds no GPU"):
        Cuda()


@pytest.mark.parametrize(("shape", "dtype"), [((2, 3), "float32"), ((5,), "int64"), ((3,), "bool"), ((0, 4), "int64")])
def test_views_are_copies_of_what_a_buffer_begins_with(shape: tuple[int, ...], dtype: str) -> None:
    """The real one's code, and the fake's: this much of it needs no GPU."""
    import torch

    wanted = (np.arange(np.prod(shape)) % 2).astype(dtype).reshape(shape)
    for view in (Cuda.view, FakeCuda.view):
        buffer = torch.zeros(64, dtype=torch.uint8)
        buffer[: wanted.nbytes] = torch.tensor(np.frombuffer(wanted.tobytes(), np.uint8))
        found = view(None, buffer, shape, dtype)
        buffer.fill_(1)
        np.testing.assert_array_equal(found.numpy(), wanted)
        assert found.numpy().dtype == dtype


@pytest.mark.filterwarnings("error")  # torch warns of memory that it must not write to
def test_refilling_copies_arrays_that_are_read_only_too() -> None:
    import torch

    tensors, array = {"x": torch.zeros(2, 2), "other": torch.ones(1)}, np.ones((2, 2), np.float32)
    array.flags.writeable = False
    Cuda.refill(None, tensors, {"x": array})
    np.testing.assert_array_equal(tensors["x"].numpy(), array)
    assert tensors["x"].data_ptr() != array.ctypes.data


def test_a_binding_is_captured_on_a_fake_gpu_and_replayed_from_then_on() -> None:
    device, call = FakeCuda(), CountedCall()
    binding = CudaBinding(device, call, device.put(given(3)), capture=True)
    assert binding.captured
    assert len(device.captures) == 1
    assert call.count == WARM_RUNS + 1
    for start in (0.0, 50.0):
        binding.refill(given(3, start))
        binding.run()
        np.testing.assert_array_equal(binding.host_outputs()["y"], 2 * given(3, start)["x"] + 1)
    assert device.replays == 2
    binding.queued_seconds(5)
    assert device.replays == 7


def test_outputs_of_a_captured_binding_stay_where_they_are_on_a_fake_gpu() -> None:
    device = FakeCuda()
    binding = CudaBinding(device, CountedCall(), device.put(given(3)), capture=True)
    binding.run()
    first = binding.outputs()["y"]
    binding.refill(given(3, 9.0))
    binding.run()
    assert binding.outputs()["y"].data_ptr() == first.data_ptr()
    np.testing.assert_array_equal(np.from_dlpack(first), 2 * given(3, 9.0)["x"] + 1)


@pytest.mark.parametrize("capture", [False, True], ids=["not captured", "captured"])
def test_outputs_before_the_first_run_are_refused_on_a_fake_gpu(capture: bool) -> None:
    device = FakeCuda()
    binding = CudaBinding(device, CountedCall(), device.put(given(1)), capture=capture)
    for ask in (binding.outputs, binding.host_outputs):
        with pytest.raises(RequestError, match="before the first run"):
            ask()
    binding.run()
    np.testing.assert_array_equal(binding.host_outputs()["y"], [[1, 3]])


def test_a_fake_capture_leaves_its_results_unwritten() -> None:
    device = FakeCuda()
    _, results = device.capture(lambda: CountedCall()({"x": device.empty((1, 2), "float32")}))
    assert set(results["y"].numpy().tobytes()) == {UNWRITTEN}


def test_what_a_fake_gpu_cannot_capture_is_launched_and_the_reason_kept() -> None:
    device = FakeCuda(refusal="\noperation not permitted when stream is capturing\nmore of it")
    session = FakeSession(device)
    assert session.graphs() == "captured"
    binding = session.bind(given(2))
    assert not binding.captured
    assert binding.refusal == "operation not permitted when stream is capturing"
    before = session.computed.count
    for start in (0.0, 7.0):
        binding.refill(given(2, start))
        binding.run()
        np.testing.assert_array_equal(binding.host_outputs()["y"], 2 * given(2, start)["x"] + 1)
    assert session.computed.count == before + 2
    assert session.executed()["cuda_graphs"] == f"not captured: {binding.refusal}"


def test_a_call_that_waits_for_its_results_is_not_captured_on_a_fake_gpu() -> None:
    device = FakeCuda()

    def waiting(inputs: dict[str, Any]) -> dict[str, Any]:
        device.wait()
        return {"y": 2 * inputs["x"] + 1}

    session = FakeSession(device, waiting)
    binding = session.bind(given(1))
    assert not binding.captured
    assert "capturing" in session.graphs()
    binding.run()
    np.testing.assert_array_equal(binding.host_outputs()["y"], [[1, 3]])


def test_errors_of_the_call_itself_are_not_taken_for_a_refusal_by_a_fake_gpu() -> None:
    def failing(inputs: dict[str, Any]) -> dict[str, Any]:
        raise RequestError("no profile holds these shapes")

    with pytest.raises(RequestError, match="no profile"):
        FakeSession(FakeCuda(), failing).bind(given(1))


def test_run_captures_on_a_fake_gpu_what_comes_often_and_only_that() -> None:
    session = FakeSession(device := FakeCuda())
    held = []
    for count in range(1, PATIENCE + 4):
        held.append((count, session.run(given(3, count))["y"]))
        assert len(device.captures) == (count >= PATIENCE)
        if count % 8 == 0:
            other = session.run(given(5, count))
            np.testing.assert_array_equal(other["y"], 2 * given(5, count)["x"] + 1)
    assert device.replays == 4
    assert len(device.captures) == 1
    for count, result in held:  # nothing that was returned has been written over
        np.testing.assert_array_equal(result, 2 * given(3, count)["x"] + 1)


def test_shapes_that_take_turns_replay_their_own_graphs_on_a_fake_gpu() -> None:
    session = FakeSession(device := FakeCuda())
    for turn in range(PATIENCE + 2):
        for batch in (1, 4):
            found = session.run(given(batch, turn))
            np.testing.assert_array_equal(found["y"], 2 * given(batch, turn)["x"] + 1)
    assert len(device.captures) == 2
    assert device.replays == 2 * 3
    session.close()
    frees().do(lambda: None)
    assert not session._often.held


def test_a_session_on_a_fake_gpu_holds_no_more_graphs_than_it_may() -> None:
    session = FakeSession(device := FakeCuda())
    for batch in range(1, MOST_GRAPHS + 2):
        for _ in range(PATIENCE):
            session.run(given(batch))
    assert len(device.captures) == MOST_GRAPHS + 1
    assert len(session._often.held) == MOST_GRAPHS


def test_a_session_that_was_refused_tries_no_other_shape_on_a_fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeCuda(refusal="a result that the host waits for")
    tried: list[Any] = []
    capture = device.capture
    monkeypatch.setattr(device, "capture", lambda call: (tried.append(call), capture(call))[1])
    session = FakeSession(device)
    for rows in (1, 2):
        for _ in range(PATIENCE + 1):
            np.testing.assert_array_equal(session.run(given(rows))["y"], 2 * given(rows)["x"] + 1)
    assert len(tried) == 1
    assert session.graphs() == "not captured: a result that the host waits for"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"x": np.zeros((2, 2))}, "wrong dtype: float64"),
        ({"x": np.zeros((2, 3), np.float32)}, "wrong shape"),
        ({"x": np.zeros((65, 2), np.float32)}, "axis 'batch'"),
        ({"x": np.full((2, 2), 1001, np.float32)}, "out of range"),
        ({"z": np.zeros(1)}, "not known"),
    ],
)
def test_inputs_are_checked_before_a_fake_gpu_sees_them(change: dict[str, np.ndarray], told: str) -> None:
    session = FakeSession(FakeCuda())
    for take in (session.bind, session.run):
        with pytest.raises(RequestError, match=told):
            take(given(2) | change)
    assert session.computed.count == 0


def test_arrays_that_are_read_only_or_strided_reach_a_fake_gpu_whole() -> None:
    session = FakeSession(FakeCuda())
    array = np.arange(8, dtype=np.float32).reshape(4, 2)
    turned = np.asfortranarray(array)
    turned.flags.writeable = False
    np.testing.assert_array_equal(session.run({"x": turned})["y"], 2 * array + 1)


@pytest.mark.parametrize("does", ["bind", "run"])
def test_a_session_touches_a_fake_gpu_in_its_turn_only(does: str) -> None:
    """While ONNX Runtime captures, whatever another thread allocates fails."""
    puts = []

    class Watched(FakeCuda):
        def put(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
            puts.append(arrays)
            return super().put(arrays)

    session = FakeSession(Watched())
    held = session._often.held
    held["a shape"] = session.bind(given(1))
    do = {"bind": session.bind, "run": session.run}[does]
    work = threading.Thread(target=do, args=(given(2),))
    with TURNS.capturing():
        work.start()
        work.join(0.3)
        assert work.is_alive()
        assert (len(puts), len(held)) == (1, 1)
    work.join(60)
    assert not work.is_alive()
    assert (len(puts), len(held)) == (2, 1)


def test_the_shape_that_came_longest_ago_loses_its_graph_on_a_fake_gpu() -> None:
    session = FakeSession(FakeCuda())
    held = session._often.held
    for number in range(MOST_GRAPHS):
        held[number] = session.bind(given(1))
    session._often.get("new", lambda: session.bind(given(2)))
    assert list(held) == [*range(1, MOST_GRAPHS), "new"]


def test_a_closed_session_on_a_fake_gpu_is_closed_once_and_says_so() -> None:
    session = FakeSession(FakeCuda())
    session.run(given(1))
    session.close()
    session.close()
    frees().do(lambda: None)
    assert session._native is None
    for use in (session.run, session.bind):
        with pytest.raises(RequestError, match="the session is closed"):
            use(given(1))


def test_a_fake_session_whose_captures_are_switched_off_captures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    device = FakeCuda()
    session = FakeSession(device)
    binding = session.bind(given(2))
    binding.run()
    np.testing.assert_array_equal(binding.host_outputs()["y"], 2 * given(2)["x"] + 1)
    for _ in range(PATIENCE + 1):
        session.run(given(2))
    assert not device.captures
    assert session.graphs() == "not captured: PLANISH_CUDA_GRAPHS is 0"
