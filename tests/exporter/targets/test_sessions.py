from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from exporter.artifact import Artifact, Axis, InputContract, Signature, TensorSpec, Variant
from exporter.errors import EnvironmentLackError, InternalError, RequestError
from exporter.targets import check_inputs, get_target, targets
from exporter.targets.onnxruntime import LITERAL

TOKENS = TensorSpec("ids", "int64", ("batch", "sequence"))
MASK = TensorSpec("mask", "int64", ("batch", "sequence"))
SIGNATURE = Signature(
    (TOKENS, MASK),
    (TensorSpec("y", "float32", ("batch", "sequence", 3)),),
    (Axis("batch", 1, 4), Axis("sequence", 1, 8)),
)
CONTRACT = InputContract(attends=True, mask="mask", id_ranges={"ids": (0, 9)})


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Looks each id up in a table of 10 rows, times the mask."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    table = np.arange(30, dtype=np.float32).reshape(10, 3)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("Cast", ["mask"], ["weight"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["weight", "last"], ["column"]),
        helper.make_node("Mul", ["rows", "column"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "lookup",
        [helper.make_tensor_value_info(s.name, TensorProto.INT64, ["batch", "sequence"]) for s in (TOKENS, MASK)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "sequence", 3])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array([2]), "last")],
    )
    path = tmp_path_factory.mktemp("lookup") / "model.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return Artifact(path, "onnx", SIGNATURE, CONTRACT)


def inputs(batch: int = 2, length: int = 4) -> dict[str, np.ndarray]:
    ids = (np.arange(batch * length).reshape(batch, length) % 10).astype(np.int64)
    return {"ids": ids, "mask": np.ones((batch, length), np.int64)}


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "openvino-cpu"])
def test_a_session_runs_and_says_what_ran(target: str, artifact: Artifact) -> None:
    session = get_target(target).open(artifact, Variant(target, "fp32"), threads=1)
    for shape in ((1, 1), (2, 4), (4, 8)):
        given = inputs(*shape)
        expected = np.arange(30, dtype=np.float32).reshape(10, 3)[given["ids"]]
        np.testing.assert_array_equal(session.run(given)["y"], expected)
    executed = session.executed()
    assert executed["device"] == "cpu"
    assert executed["precision"] == "fp32"


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "openvino-cpu"])
def test_a_binding_reads_its_inputs_anew_at_every_run(target: str, artifact: Artifact) -> None:
    session = get_target(target).open(artifact, Variant(target, "fp32"), threads=1)
    given = inputs()
    binding = session.bind(given)
    binding.run()
    first = np.array(binding.outputs()["y"])
    given["ids"][:] = 0
    binding.run()
    assert not np.array_equal(first, binding.outputs()["y"])
    np.testing.assert_array_equal(binding.outputs()["y"], np.broadcast_to([0.0, 1.0, 2.0], (2, 4, 3)))


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A product with a matrix: arithmetic, which a runtime may do in another precision."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 64])],
        [numpy_helper.from_array(weight, "w")],
    )
    path = tmp_path_factory.mktemp("product") / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    x, y = (TensorSpec(name, "float32", ("batch", 64)) for name in "xy")
    return Artifact(path, "onnx", Signature((x,), (y,), (Axis("batch", 1, 4),)), InputContract())


@pytest.mark.parametrize(("precision", "kind"), [("fp32", "f32"), ("bf16", "bf16")])
def test_what_openvino_ran_is_read_from_what_it_compiled(product: Artifact, precision: str, kind: str) -> None:
    variant = Variant("openvino-cpu", precision)
    if not get_target("openvino-cpu").availability(variant).available:
        pytest.skip("this machine has no BF16 instructions")
    executed = get_target("openvino-cpu").open(product, variant, threads=1).executed()
    assert executed["compute_layers"] == {kind: 1}
    assert executed["precision"] == precision


def test_openvino_in_another_precision_than_asked_for_simulated_is_noticed(
    product: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporter.targets import openvino

    monkeypatch.setattr(openvino, "layer_precisions", lambda _: Counter({"f32": 1}))
    with pytest.raises(InternalError, match="another precision"):
        openvino.OpenVinoSession(product, "bf16", 1)


def test_openvino_says_that_it_does_not_know_where_a_model_does_no_arithmetic(artifact: Artifact) -> None:
    from exporter.targets.openvino import OpenVinoSession

    assert OpenVinoSession(artifact, "bf16", 1).executed()["precision"] == "unknown"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"ids": None}, "missing"),
        ({"extra": np.zeros(1)}, "not known"),
        ({"ids": np.zeros((2, 4), np.int32)}, "dtype"),
        ({"ids": np.zeros((2, 4, 1), np.int64)}, "number of dimensions"),
        ({"ids": np.full((2, 4), 10)}, "out of range: 10"),
        ({"ids": np.full((2, 4), -1)}, "out of range: -1"),
        ({"ids": np.zeros((2, 9), np.int64), "mask": np.ones((2, 9), np.int64)}, "axis 'sequence'"),
        ({"ids": np.zeros((5, 4), np.int64), "mask": np.ones((5, 4), np.int64)}, "axis 'batch'"),
        ({"ids": np.zeros((2, 0), np.int64), "mask": np.ones((2, 0), np.int64)}, "axis 'sequence'"),
        ({"mask": np.ones((2, 3), np.int64)}, "differs between inputs"),
        ({"mask": np.array([[1, 1, 1, 1], [0, 0, 0, 0]])}, "attends to no token: row 1"),
    ],
)
def test_inputs_are_checked_before_native_code_sees_them(change: dict, told: str) -> None:
    given = {name: value for name, value in (inputs() | change).items() if value is not None}
    with pytest.raises(RequestError, match=told):
        check_inputs(given, SIGNATURE, CONTRACT)


def test_a_masked_array_hides_no_value() -> None:
    ids = np.ma.masked_array(np.where(inputs()["ids"] == inputs()["ids"].flat[0], 10**6, inputs()["ids"]))
    ids[ids == 10**6] = np.ma.masked
    assert ids.max() <= CONTRACT.id_ranges["ids"][1]  # NumPy itself looks at the others only
    with pytest.raises(RequestError, match="out of range"):
        check_inputs(inputs() | {"ids": ids}, SIGNATURE, CONTRACT)
    assert type(check_inputs(inputs() | {"ids": np.ma.masked_array(inputs()["ids"])}, SIGNATURE, CONTRACT)["ids"]) is (
        np.ndarray
    )


@pytest.mark.parametrize("value", [1.9, -0.9, np.nan, np.inf, -np.inf])
def test_a_mask_of_floats_is_held_to_its_range_exactly(value: float) -> None:
    signature = Signature((TensorSpec("mask", "float32", ("batch", "sequence")),), (), SIGNATURE.axes)
    contract = InputContract(attends=True, mask="mask", id_ranges={"mask": (0, 1)})
    check_inputs({"mask": np.array([[1, 0]], np.float32)}, signature, contract)
    with pytest.raises(RequestError, match="out of range"):
        check_inputs({"mask": np.array([[1, value]], np.float32)}, signature, contract)


def test_a_batch_of_nothing_breaks_no_promise() -> None:
    axes = (Axis("batch", 0, 8), Axis("sequence", 1, 8))
    signature = Signature((TensorSpec("mask", "int64", ("batch", "sequence")),), (), axes)
    given = {"mask": np.zeros((0, 4), np.int64)}
    assert check_inputs(given, signature, InputContract(attends=True, mask="mask"))["mask"].shape == (0, 4)


def test_a_row_that_attends_to_nothing_is_fine_without_the_contract() -> None:
    given = inputs() | {"mask": np.zeros((2, 4), np.int64)}
    check_inputs(given, SIGNATURE, InputContract(attends=False, mask="mask"))


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "openvino-cpu"])
def test_a_truncated_model_is_a_readable_error(target: str, artifact: Artifact, tmp_path: Path) -> None:
    broken = tmp_path / "model.onnx"
    broken.write_bytes(artifact.path.read_bytes()[:100])
    with pytest.raises(RequestError, match="cannot open the model"):
        get_target(target).open(Artifact(broken, "onnx", SIGNATURE, CONTRACT), Variant(target, "fp32"), threads=1)


def test_every_target_says_whether_it_can_run_and_what_would_enable_it() -> None:
    for name, target in targets().items():
        state = target.availability()
        assert target.name == name
        assert state.available or (state.reason and state.remedy), name


@pytest.mark.parametrize("name", ["onnxruntime-cuda", "inductor-cuda", "tensorrt", "tensorrt-rtx"])
def test_nvidia_targets_refuse_to_open_with_what_they_lack(name: str, artifact: Artifact) -> None:
    if get_target(name).availability().available:
        pytest.skip("this machine has what the target needs")
    with pytest.raises(EnvironmentLackError, match="cannot run here"):
        get_target(name).open(artifact, Variant(name, "fp16"), threads=1)


def test_an_unknown_target_lists_the_known_ones() -> None:
    with pytest.raises(RequestError, match="onnxruntime-cpu"):
        get_target("onnxruntime-tpu")


def test_a_graph_without_integers_is_not_told_to_be_int8_or_int4(product: Artifact) -> None:
    for target, precision, form in (
        ("openvino-cpu", "int8", "static"),
        ("onnxruntime-cpu", "int8", "dynamic"),
        ("onnxruntime-cpu", "int8", "weights"),
        ("onnxruntime-cpu", "int4", None),
    ):
        session = get_target(target).open(product, Variant(target, precision, form), threads=1)
        assert session.executed()["precision"] == "fp32"


def test_a_session_that_emulates_says_what_runs_and_what_for(product: Artifact) -> None:
    for precision in ("int8", "fp8"):
        target, variant = get_target("onnxruntime-cpu"), Variant("onnxruntime-cpu", precision, LITERAL)
        executed = target.open(product, variant, threads=1).executed()
        assert (executed["precision"], executed["emulates"]) == ("fp32", precision)
        assert variant not in target.variants([precision], every_form=True)


def test_a_shaped_session_compiles_for_what_is_bound_and_for_what_comes_often(
    product: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporter.targets import openvino

    free = openvino.OpenVinoSession(product, "fp32", 1)
    fixed = openvino.OpenVinoSession(product, "fp32", 1, shaped=True)
    assert (free.executed()["shapes"], fixed.executed()["shapes"]) == ("free", "fixed")
    draw = np.random.default_rng(0)
    inputs = {rows: {"x": draw.standard_normal((rows, 64)).astype(np.float32)} for rows in (1, 2, 3, 4)}
    assert fixed._shaped is not None
    fixed._shaped.most = 2
    monkeypatch.setattr(fixed._shaped, "_patience", 2)

    def held() -> list[int]:
        assert fixed._shaped is not None
        return [dict(shapes)["x"][0] for shapes in fixed._shaped.held]

    def run(rows: int) -> None:
        np.testing.assert_allclose(fixed.run(inputs[rows])["y"], free.run(inputs[rows])["y"], rtol=1e-5)

    for rows in (1, 2, 3, 2, 1):
        run(rows)
    assert held() == [2, 1]
    binding = fixed.bind(inputs[3])
    binding.run()
    np.testing.assert_allclose(binding.host_outputs()["y"], free.run(inputs[3])["y"], rtol=1e-5)
    assert held() == [1, 3]
    for rows in (4, 4, 2, 2):
        run(rows)
    assert held() == [3, 4]  # the second change wants four
    long = {"x": np.zeros((5, 64), np.float32)}
    with pytest.raises(RequestError, match="out of range"):
        fixed.run(long)


def test_what_an_int8_form_adds_at_its_end_changes_how_it_is_opened_and_not_its_file() -> None:
    target = get_target("openvino-cpu")
    for form in ("static-bf16", "static-shaped", "static-shaped-bf16"):
        assert target.opened(Variant("openvino-cpu", "int8", form)) == Variant("openvino-cpu", "int8", "static")
    for variant in (Variant("openvino-cpu", "int8", "static-kept"), Variant("openvino-cpu", "bf16")):
        assert target.opened(variant) == variant
