"""What TensorRT's builder refuses, planted in small graphs: told by the node, where it stands, and with what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from exporter.errors import EnvironmentLackError, InternalError, RequestError
from exporter.targets.tensorrt_builder import RTX, TENSORRT, EngineOptions
from exporter.targets.tensorrt_errors import explain
from tests.exporter.targets.tensorrt_graphs import WIDTH, build, needs_rtx, product, save

SQUARE, ROW = (WIDTH, WIDTH), (WIDTH,)
INT8_FORM = "form made for TensorRT"


def node(operator: str, inputs: list[str], output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, [output], name=f"encoder.layer.0/{operator}", **attributes)


def mixed(operator: str, *inputs: str, **attributes: object) -> Callable[[Path], Path]:
    """An operator between a float32 input and float16 constants."""

    def plant(path: Path) -> Path:
        constants = {"w": np.ones(SQUARE, np.float16), "b": np.ones(ROW, np.float16), "c": np.ones(SQUARE, bool)}
        return save(path, [node(operator, list(inputs), "y", **attributes)], constants)

    return plant


def foreign(operator: str) -> Callable[[Path], Path]:
    """An operator of ONNX Runtime's own."""

    def plant(path: Path) -> Path:
        return save(path, [node(operator, ["x", "b"], "y", domain="com.microsoft")], {"b": np.ones(ROW, np.float32)})

    return plant


def rounded(dtype: type, zero: int) -> Callable[[Path], Path]:
    """A Q/DQ pair around an activation."""

    def plant(path: Path) -> Path:
        pair = [node("QuantizeLinear", ["x", "s", "z"], "q"), node("DequantizeLinear", ["q", "s", "z"], "y")]
        return save(path, pair, {"s": np.array(0.1, np.float32), "z": np.array(zero, dtype)})

    return plant


def weights(dtype: type, zero: int) -> Callable[[Path], Path]:
    """A product whose weights are stored with a zero point for each channel."""

    def plant(path: Path) -> Path:
        scales = {"s": np.full(ROW, 0.1, np.float32), "z": np.full(ROW, zero, dtype), "q": np.ones(SQUARE, dtype)}
        return save(
            path, [node("DequantizeLinear", ["q", "s", "z"], "w", axis=1), node("MatMul", ["x", "w"], "y")], scales
        )

    return plant


def dynamic(path: Path) -> Path:
    """A product in the form that ONNX Runtime's CPU provider takes."""
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], name="encoder.layer.0/DynamicQuantizeLinear"),
        node("MatMulInteger", ["q", "w", "z"], "i"),
        node("Cast", ["i"], "f", to=1),
        node("Mul", ["f", "s"], "y"),
    ]
    return save(path, nodes, {"w": np.ones(SQUARE, np.int8)})


def integers(operator: str) -> Callable[[Path], Path]:
    """A product of integers as ONNX had it before Q/DQ pairs."""

    def plant(path: Path) -> Path:
        constants = {"w": np.ones(SQUARE, np.int8), "s": np.array(0.1, np.float32), "z": np.array(0, np.int8)}
        pair = ["s", "z"]
        inputs = ["q", "w"] if operator == "MatMulInteger" else ["q", *pair, "w", *pair, *pair]
        nodes = [helper.make_node("QuantizeLinear", ["x", *pair], ["q"], name="q"), node(operator, inputs, "i")]
        return save(path, [*nodes, helper.make_node("Cast", ["i"], ["y"], to=1, name="last")], constants)

    return plant


def unfit(path: Path) -> Path:
    return save(path, [node("MatMul", ["x", "w"], "y")], {"w": np.ones((WIDTH + 1, WIDTH), np.float32)})


REFUSED = {
    "mixed-matmul": (mixed("MatMul", "x", "w"), "MatMul", "same input types", "add a Cast"),
    "mixed-gemm": (mixed("Gemm", "x", "w", "b"), "Gemm", "same input types", "add a Cast"),
    "mixed-add": (mixed("Add", "x", "b"), "Add", "types Float and Half", "add a Cast"),
    "mixed-where": (mixed("Where", "c", "x", "w"), "Where", "Float and Half", "add a Cast"),
    "mixed-concat": (mixed("Concat", "x", "w", axis=0), "Concat", "of type Half", "add a Cast"),
    "mixed-norm": (mixed("LayerNormalization", "x", "b", "b"), "LayerNormalization", "identical types", "add a Cast"),
    "asymmetric-int8": (rounded(np.int8, 3), "QuantizeLinear", "zero point", INT8_FORM),
    "asymmetric-uint8": (rounded(np.uint8, 128), "QuantizeLinear", "zero point", INT8_FORM),
    "uint8-weights": (weights(np.uint8, 128), "DequantizeLinear", "UINT8", INT8_FORM),
    "asymmetric-weights": (weights(np.int8, 3), "DequantizeLinear", "zero point", INT8_FORM),
    "fused": (foreign("BiasGelu"), "BiasGelu", "no such operator", "use the portable graph"),
    "fused-norm": (foreign("SkipLayerNormalization"), "SkipLayerNormalization", "no such", "use the portable graph"),
    "dynamic": (dynamic, "DynamicQuantizeLinear", "no such operator", INT8_FORM),
    "integer-product": (integers("MatMulInteger"), "MatMulInteger", "no such operator", INT8_FORM),
    "quantized-product": (integers("QLinearMatMul"), "QLinearMatMul", "no such operator", INT8_FORM),
    "shapes": (unfit, "MatMul", "must match", "shape inference"),
}


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("what", list(REFUSED))
def test_a_refused_graph_is_told_by_its_node(tmp_path: Path, what: str) -> None:
    plant, operator, reason, remedy = REFUSED[what]
    path = plant(tmp_path / "model.onnx")
    with pytest.raises(RequestError, match="refuses a node") as caught:
        build(path)
    value = str(caught.value.value)
    where = f"{operator} 'encoder.layer.0/{operator}' of model.onnx"
    assert value.startswith(where)
    assert reason in value
    assert "encoder.layer.0" not in value.removeprefix(where)  # nor is it said twice
    assert "checkMacros" not in value  # what it says of the driver that is not there
    assert remedy in str(caught.value.remedy)
    assert not path.with_suffix(".plan").exists()


@needs_rtx
@pytest.mark.slow
def test_attention_that_has_no_kernel_is_named_though_the_builder_does_not(tmp_path: Path) -> None:
    """The parser takes it, and the builder refuses it without a name."""
    path = tmp_path / "model.onnx"
    save(path, [node("Attention", ["q", "k", "v"], "y")], inputs=("q", "k", "v"), shape=(2, 64, 64), opset=23)
    with pytest.raises(RequestError, match="cannot build the engine") as caught:
        build(path)
    assert str(caught.value.value).startswith(
        "Attention 'encoder.layer.0/Attention' of model.onnx: Attention operation"
    )
    assert "export.opset=20" in str(caught.value.remedy)


BEFORE, AFTER = "embeddings/Relu", "encoder.layer.0/Sigmoid"


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize(("name", "told"), [("node_Add_3", "Add 'node_Add_3' of"), ("", "makes 'middle', of")])
def test_a_node_whose_name_says_nothing_is_told_by_its_neighbours(tmp_path: Path, name: str, told: str) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name=BEFORE),
        helper.make_node("Neg", ["a"], ["b"], name="node_Neg"),
        helper.make_node("Add", ["b", "w"], ["middle"], name=name),
        helper.make_node("Neg", ["middle"], ["c"]),
        helper.make_node("Sigmoid", ["c"], ["y"], name=AFTER),
    ]
    path = save(tmp_path / "model.onnx", nodes, {"w": np.ones(SQUARE, np.float16)})
    with pytest.raises(RequestError, match="refuses a node") as caught:
        build(path)
    assert told in str(caught.value.value)
    assert f"(after {BEFORE!r}, before {AFTER!r})" in str(caught.value.value)
    assert "node_of" not in str(caught.value.value)


def test_a_node_without_neighbours_is_told_alone(tmp_path: Path) -> None:
    path = save(tmp_path / "model.onnx", [helper.make_node("Relu", ["x"], ["y"], name="alone")])
    errors = [{"node": "alone", "operator": "Relu", "description": "false"}, {"node": "b", "description": "false"}]
    error = explain({"stage": "parse", "errors": errors, "version": "11.0"}, TENSORRT, path)
    assert error.value == "Relu 'alone' of model.onnx (and 1 more): TensorRT has no such operator"
    gone = explain({"stage": "parse", "errors": errors, "version": "11.0"}, TENSORRT, tmp_path / "gone.onnx")
    assert gone.value == "Relu 'alone' of gone.onnx (and 1 more): TensorRT has no such operator"


def numbers(path: Path, precision: str) -> Path:
    """A product in one precision."""
    if precision == "fp8":
        constants = {"s": np.array(0.1, np.float32), "w": np.ones(SQUARE, np.float32)}
        pairs = [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="a"),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["xr"], name="b"),
            helper.make_node("QuantizeLinear", ["w", "s", "z"], ["wq"], name="c"),
            helper.make_node("DequantizeLinear", ["wq", "s", "z"], ["wr"], name="d"),
            node("MatMul", ["xr", "wr"], "y"),
        ]
        save(path, pairs, constants, opset=20)
        model = onnx.load(path)
        model.graph.initializer.append(helper.make_tensor("z", onnx.TensorProto.FLOAT8E4M3FN, [], [0.0]))
        onnx.save(model, path)
        return path
    if precision == "fp32":
        return product(path)
    kind = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]
    casts = [helper.make_node("Cast", [name], [f"{name}h"], to=kind, name=f"cast_{name}") for name in "xw"]
    back = helper.make_node("Cast", ["yh"], ["y"], to=onnx.TensorProto.FLOAT, name="back")
    return save(path, [*casts, node("MatMul", ["xh", "wh"], "yh"), back], {"w": np.ones(SQUARE, np.float32)})


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "gpu", "told", "remedy"),
    [
        ("fp8", "SM75", "compute capability 7.5 have no FP8: model.onnx", ("8.9 (Ada) or later", "take fp16 ")),
        ("fp8", "SM86", "compute capability 8.6 have no FP8: model.onnx", ("8.9 (Ada) or later", "take int8 or fp16")),
        ("bf16", "SM75", "compute capability 7.5 have no BF16: model.onnx", ("8.0 (Ampere) or later", "take fp16")),
        ("fp32", "SM75", "FP16 only on GPUs of compute capability 7.5 (Turing): 'encoder.layer.0/", ("an fp16 file",)),
    ],
)
def test_a_gpu_that_lacks_a_type_is_told_as_such(
    tmp_path: Path, precision: str, gpu: str, told: str, remedy: tuple[str, ...]
) -> None:
    with pytest.raises(RequestError) as caught:
        build(numbers(tmp_path / "model.onnx", precision), EngineOptions(compute_capabilities=(gpu,)))
    assert told in str(caught.value)
    for part in remedy:
        assert part in str(caught.value.remedy)
    assert "pass.cpp" not in str(caught.value)


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize(("precision", "gpu"), [("fp16", "SM75"), ("bf16", "SM80"), ("fp8", "SM89"), ("fp8", "SM121")])
def test_a_gpu_that_has_it_is_built_for(tmp_path: Path, precision: str, gpu: str) -> None:
    assert build(numbers(tmp_path / "model.onnx", precision), EngineOptions(compute_capabilities=(gpu,))).bytes > 0


def test_an_error_without_a_node_still_says_something() -> None:
    told = {"stage": "build", "errors": [], "log": [], "version": "11.0"}
    assert "no reason was given" in str(explain(told, TENSORRT, Path("model.onnx")))


def test_a_type_that_is_not_known_is_told_by_the_library_s_name() -> None:
    text = "Cannot compile for target(s) sm80, sm86, because the model contains HW-specific datatypes: fp4_e2m1. In x"
    error = explain({"stage": "build", "errors": [{"description": text}], "version": "1.7"}, RTX, Path("model.onnx"))
    assert error.what == "the GPU lacks a type of the graph (fp4_e2m1)"


def test_a_library_that_cannot_be_imported() -> None:
    told = {"stage": "import", "errors": [{"description": "ImportError: no libcuda"}], "version": ""}
    assert isinstance(explain(told, RTX, Path("model.onnx")), EnvironmentLackError)
    assert not isinstance(explain(told, RTX, Path("model.onnx")), InternalError)
