"""Sessions of TensorRT engines over fakes of the library and of the GPU; the last test has the real library."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.artifact import Artifact, Axis, InputContract, Signature, TensorSpec
from exporter.errors import EnvironmentLackError, RequestError
from exporter.targets import tensorrt_session
from exporter.targets.shape_cache import PATIENCE
from exporter.targets.tensorrt_session import TensorRtSession, choose_profile
from tests.exporter.targets import fake_tensorrt
from tests.exporter.targets.fake_cuda import SIDE_STREAM, FakeCuda

AXES = (Axis("batch", 0, 64),)
X = TensorSpec("x", "float32", ("batch", 2))
Y = TensorSpec("y", "float32", ("batch", 2))
AFFINE = Signature((X,), (Y, TensorSpec("total", "float32", ("batch",))), AXES)
FOUND = Signature((X,), (TensorSpec("found", "int64", ("found_0", 2)), Y), AXES)
ONE_PROFILE = [{"x": ((0, 2), (16, 2), (64, 2))}]
TWO_PROFILES = [{"x": ((0, 2), (2, 2), (8, 2))}, {"x": ((4, 2), (32, 2), (64, 2))}]


@pytest.fixture(autouse=True)
def fake_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.module("tensorrt"))


def plan_of(signature: Signature, kernel: str, profiles: Any = ONE_PROFILE, **more: Any) -> bytes:
    inputs, outputs = (
        {spec.name: (spec.dtype, spec.shape) for spec in specs} for specs in (signature.inputs, signature.outputs)
    )
    return fake_tensorrt.plan(kernel, inputs, outputs, profiles, **more)


def opened(
    folder: Path, signature: Signature, content: bytes, device: FakeCuda | None = None, **more: Any
) -> TensorRtSession:
    path = folder / "model.plan"
    path.write_bytes(content)
    artifact = Artifact(path, "onnx", signature, InputContract())
    return TensorRtSession(artifact, "tensorrt", "fp16", device=device or FakeCuda(), **more)


def given(batch: int, start: float = -3.0) -> dict[str, np.ndarray]:
    return {"x": np.arange(start, start + 2 * batch, dtype=np.float32).reshape(batch, 2)}


def check(signature: Signature, found: dict[str, np.ndarray], x: np.ndarray) -> None:
    assert list(found) == [spec.name for spec in signature.outputs]
    np.testing.assert_array_equal(found["y"], 2 * x + 1)
    if "total" in found:
        np.testing.assert_array_equal(found["total"], x.sum(1))
    if "found" in found:
        np.testing.assert_array_equal(found["found"], np.argwhere(x > 0))
        assert found["found"].dtype == np.int64


def test_a_fake_engine_computes_what_the_session_returns(tmp_path: Path) -> None:
    session = opened(tmp_path, AFFINE, plan_of(AFFINE, "affine"))
    held = []
    for batch in (1, 64, 3, 64, 0):
        inputs = given(batch, batch)
        held.append((inputs["x"], session.run(inputs)))
    for x, found in held:
        check(AFFINE, found, x)
    executed = session.executed()
    assert executed["runtime"] == f"tensorrt {fake_tensorrt.VERSION}"
    assert executed["gpu"] == "fake GPU"
    assert (executed["precision"], executed["profiles"], executed["layers"]) == ("fp16", 1, 3)
    assert executed["cuda_graphs"] == "captured"


def test_inputs_of_a_fake_engine_are_matched_by_name(tmp_path: Path) -> None:
    ids, mask = (TensorSpec(name, "int64", ("batch", "sequence")) for name in ("ids", "mask"))
    axes = (Axis("batch", 1, 4), Axis("sequence", 1, 8))
    signature = Signature((ids, mask), (TensorSpec("y", "float32", ("batch", "sequence")),), axes)
    shapes = ((1, 1), (2, 4), (4, 8))
    session = opened(tmp_path, signature, plan_of(signature, "lookup", [{"ids": shapes, "mask": shapes}]))
    numbers = np.arange(8).reshape(2, 4)
    found = session.run({"mask": (numbers % 2).astype(np.int64), "ids": numbers.astype(np.int64)})
    np.testing.assert_array_equal(found["y"], 10 * numbers * (numbers % 2))


def test_a_binding_of_a_fake_engine_is_captured_with_a_context_of_its_own(tmp_path: Path) -> None:
    session = opened(tmp_path, AFFINE, plan_of(AFFINE, "affine"), device := FakeCuda())
    bindings = {batch: session.bind(given(batch)) for batch in (2, 5)}
    assert len(device.captures) == 2
    session.run(given(7))
    assert len(session._native.engine._contexts) == 3
    for batch, binding in bindings.items():
        assert binding.captured
        binding.refill(given(batch, 20))
        binding.run()
        check(AFFINE, binding.host_outputs(), given(batch, 20)["x"])
    assert device.replays == 2


def test_shapes_of_a_fake_engine_that_come_often_are_captured(tmp_path: Path) -> None:
    session = opened(tmp_path, AFFINE, plan_of(AFFINE, "affine"), device := FakeCuda())
    for count in range(PATIENCE + 3):
        check(AFFINE, session.run(given(4, count)), given(4, count)["x"])
    assert len(device.captures) == 1
    assert device.replays == 4


def test_a_fake_engine_runs_each_shape_with_its_profile(tmp_path: Path) -> None:
    session = opened(tmp_path, AFFINE, plan_of(AFFINE, "affine", TWO_PROFILES))
    for batch in (2, 60, 0, 4, 8, 64, 2):
        check(AFFINE, session.run(given(batch)), given(batch)["x"])
    ran = {context._profile: context._executed for context in session._native.engine._contexts}
    assert {profile: len(runs) for profile, runs in ran.items()} == {0: 5, 1: 2}
    assert all(run == profile for profile, runs in ran.items() for run in runs)
    assert session.executed()["profiles"] == 2


def test_a_shape_that_no_profile_of_a_fake_engine_holds_is_refused(tmp_path: Path) -> None:
    session = opened(tmp_path, AFFINE, plan_of(AFFINE, "affine", [{"x": ((1, 2), (8, 2), (16, 2))}]))
    for ask in (session.run, session.bind):
        with pytest.raises(RequestError, match="no profile of the engine holds these shapes"):
            ask(given(17))
    check(AFFINE, session.run(given(16)), given(16)["x"])


def test_outputs_of_a_fake_engine_that_depend_on_values(tmp_path: Path) -> None:
    session = opened(tmp_path, FOUND, plan_of(FOUND, "found"))
    held = []
    for inputs in (given(3), given(40), given(2, -9.0), given(5, 1.0), given(0), given(8)):
        held.append((inputs["x"], session.run(inputs)))
    assert [len(found["found"]) for _, found in held] == [2, 76, 0, 10, 0, 12]
    for x, found in held:
        check(FOUND, found, x)


def test_what_depends_on_values_is_not_captured_and_runs_all_the_same_fake(tmp_path: Path) -> None:
    session = opened(tmp_path, FOUND, plan_of(FOUND, "found"), device := FakeCuda())
    binding = session.bind(given(3))
    assert device.captures == []
    for start in (-3.0, 4.0, -9.0):
        binding.refill(given(3, start))
        binding.run()
        check(FOUND, binding.host_outputs(), given(3, start)["x"])
    assert session.executed()["cuda_graphs"] == (
        "not captured: the shape of an output depends on the values of the inputs: found"
    )
    for count in range(PATIENCE + 2):
        check(FOUND, session.run(given(3, -count)), given(3, -count)["x"])


def test_bytes_that_are_no_engine_are_refused_with_the_words_of_the_fake(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot load the engine") as caught:
        opened(tmp_path, AFFINE, b"\x00\xff")
    assert "magic tag does not match" in str(caught.value)
    assert "deserialization failed" in str(caught.value)
    assert "warning" not in str(caught.value)


def test_host_code_of_a_fake_engine_is_allowed_where_it_is_version_compatible_only(tmp_path: Path) -> None:
    content = plan_of(AFFINE, "affine", host_code=True)
    with pytest.raises(RequestError, match="host code is not allowed"):
        opened(tmp_path, AFFINE, content)
    session = opened(tmp_path, AFFINE, content, host_code=True)
    assert session._native._opened.runtime.engine_host_code_allowed is True
    check(AFFINE, session.run(given(2)), given(2)["x"])
    assert opened(tmp_path, AFFINE, plan_of(AFFINE, "affine"))._native._opened.runtime.engine_host_code_allowed is False


@pytest.mark.parametrize(
    ("signature", "told"),
    [
        (Signature((X,), (Y,), AXES), "total (output FLOAT)"),
        (
            Signature((X,), (*AFFINE.outputs, TensorSpec("more", "float32", ("batch",))), AXES),
            "more (is not there)",
        ),
        (
            Signature((TensorSpec("z", "float32", ("batch", 2)),), AFFINE.outputs, AXES),
            "x (input FLOAT), z (is not there)",
        ),
        (
            Signature((TensorSpec("x", "float16", ("batch", 2)),), AFFINE.outputs, AXES),
            "x (input FLOAT)",
        ),
        (Signature((X, *AFFINE.outputs[1:]), (Y,), AXES), "total (output FLOAT)"),
    ],
)
def test_a_fake_engine_with_other_tensors_than_the_signature_is_refused(
    signature: Signature, told: str, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match="not those of the signature") as caught:
        opened(tmp_path, signature, plan_of(AFFINE, "affine"))
    assert caught.value.value == told


def test_a_fake_engine_whose_input_holds_shapes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="values are shapes"):
        opened(tmp_path, AFFINE, plan_of(AFFINE, "affine", shape_inputs=["x"]))


def test_a_fake_engine_that_does_not_run_is_an_error_with_the_words_of_the_library(tmp_path: Path) -> None:
    session = opened(tmp_path, AFFINE, plan_of(AFFINE, "affine", fails="CUDA error 700"))
    for _ in range(2):
        with pytest.raises(RequestError, match="could not run the engine") as caught:
            session.run(given(2))
        assert str(caught.value).count("CUDA error 700") == 1


def test_a_fake_gpu_without_memory_for_a_context_is_said_to_be_one(tmp_path: Path) -> None:
    session = opened(tmp_path, AFFINE, plan_of(AFFINE, "affine", contexts=1))
    session.run(given(2))
    with pytest.raises(EnvironmentLackError, match="no execution context"):
        session.bind(given(2))


def test_a_library_that_cannot_be_imported_is_said_to_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EnvironmentLackError, match="tensorrt cannot be imported"):
        opened(tmp_path, AFFINE, plan_of(AFFINE, "affine"))


@pytest.mark.parametrize("gone", ["set_input_shape", "set_tensor_address", "set_output_allocator"])
def test_the_fake_notices_what_the_session_would_leave_out(
    gone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = opened(tmp_path, FOUND, plan_of(FOUND, "found"))
    monkeypatch.setattr(fake_tensorrt.FakeContext, gone, lambda *arguments: True)
    with pytest.raises(RequestError, match="could not run the engine"):
        session.run(given(2))


def test_the_fake_notices_wrong_addresses_streams_and_profiles() -> None:
    lines: list[str] = []

    class Log(fake_tensorrt.FakeLogger):
        def log(self, severity: Any, msg: str) -> None:
            lines.append(msg)

    engine = fake_tensorrt.FakeRuntime(Log()).deserialize_cuda_engine(plan_of(AFFINE, "affine", TWO_PROFILES))
    assert engine is not None
    context, device = engine.create_execution_context(), FakeCuda()
    assert context is not None
    assert not context.set_optimization_profile_async(2, SIDE_STREAM)
    assert not context.set_optimization_profile_async(1, 0)
    assert context.set_optimization_profile_async(1, SIDE_STREAM)
    assert not context.set_input_shape("x", (3, 2))
    assert context.set_input_shape("x", (4, 2))
    tensors = {**device.put(given(4)), "y": device.empty((4, 2), "float32"), "total": device.empty((3,), "float32")}
    for name, tensor in tensors.items():
        assert context.set_tensor_address(name, tensor.data_ptr())
    assert not context.execute_async_v3(SIDE_STREAM)  # too little memory for one
    assert "illegal memory access" in lines[-1]
    tensors["total"] = device.empty((4,), "float32")
    assert context.set_tensor_address("total", tensors["total"].data_ptr())
    assert context.execute_async_v3(SIDE_STREAM)
    assert not context.execute_async_v3(0)
    assert context.set_optimization_profile_async(0, SIDE_STREAM)  # what was set is not set any more
    assert not context.execute_async_v3(SIDE_STREAM)
    assert "shapes are not set" in lines[-1]
    assert context.set_input_shape("x", (4, 2))
    del tensors["x"]
    assert not context.execute_async_v3(SIDE_STREAM)  # memory that nobody holds any more
    assert "illegal memory access" in lines[-1]


SMALL, LARGE = {"x": ((1, 1), (2, 16), (8, 64))}, {"x": ((1, 1), (8, 64), (8, 64))}
SHIFTED = {"x": ((4, 32), (8, 64), (16, 128))}


@pytest.mark.parametrize(
    ("profiles", "shape", "wanted"),
    [
        ([SMALL], (1, 1), 0),
        ([SMALL], (8, 64), 0),
        ([SMALL, LARGE], (1, 16), 0),
        ([SMALL, LARGE], (8, 64), 1),
        ([LARGE, SMALL], (2, 16), 1),
        ([SMALL, LARGE], (1, 1), 0),  # fewer than either is made for: the nearer
        ([SMALL, LARGE], (4, 32), 0),  # as far from both: the first
        ([SMALL, SHIFTED], (2, 64), 0),  # only one of them holds it
        ([SMALL, SHIFTED], (9, 64), 1),
        ([SMALL, SHIFTED], (16, 128), 1),
    ],
)
def test_the_profile_is_the_one_that_is_made_for_the_nearest_shape(
    profiles: list[Any], shape: tuple[int, int], wanted: int
) -> None:
    assert choose_profile(profiles, {"x": shape}) == wanted


def test_every_input_has_to_be_within_the_profile() -> None:
    profile = {"ids": ((1, 1), (2, 2), (4, 4)), "mask": ((1, 1), (2, 2), (4, 2))}
    assert choose_profile([profile], {"ids": (4, 2), "mask": (4, 2)}) == 0
    with pytest.raises(RequestError, match="no profile"):
        choose_profile([profile], {"ids": (4, 3), "mask": (4, 3)})


@pytest.mark.parametrize("shape", [(0, 1), (1, 65), (9, 64)])
def test_where_no_profile_holds_a_shape_the_error_says_which_there_are(shape: tuple[int, int]) -> None:
    with pytest.raises(RequestError, match="no profile of the engine") as caught:
        choose_profile([SMALL, LARGE], {"x": shape})
    assert "(8, 64)" in str(caught.value)
    assert str(shape) in str(caught.value)


def test_tensorrt_for_rtx_itself_says_why_it_loads_no_such_engine(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    path = tmp_path / "model.plan"
    path.write_bytes(b"no engine")
    artifact = Artifact(path, "onnx", AFFINE, InputContract())
    with pytest.raises(RequestError, match="cannot load the engine") as caught:
        TensorRtSession(artifact, "tensorrt_rtx", "fp16", device=FakeCuda())
    assert "Error Code" in str(caught.value)


def test_an_allocator_of_tensorrt_for_rtx_itself_grows_and_never_gives_null() -> None:
    library, device = pytest.importorskip("tensorrt_rtx"), FakeCuda()
    allocator = tensorrt_session._allocator(library, device)
    assert isinstance(allocator, library.IOutputAllocator)
    empty = allocator.reallocate_output("y", 0, 0, 256)
    assert empty
    large = allocator.reallocate_output_async("y", empty, 1000, 256, SIDE_STREAM)
    assert large == allocator.reallocate_output_async("y", large, 10, 256, SIDE_STREAM)
    assert allocator.buffer.numel() == 1000
    allocator.notify_shape("y", library.Dims([2, 0]))
    assert allocator.shape == (2, 0)
