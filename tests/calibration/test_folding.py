"""Which constants take a division per channel, that the division is exact, and where an operator is needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from calibration.folding import divide, makers
from exporter.passes.checks import check_graph, run_model

WIDTH = 6
FACTORS = np.array([0.25, 3.0, 1.0, 40.0, 0.01, 7.0], np.float32)
RNG = np.random.default_rng(2)
ARRAYS = {
    name: RNG.standard_normal(shape).astype(np.float32)
    for name, shape in {
        "gain": (WIDTH,),
        "shift": (WIDTH,),
        "one": (1,),
        "scalar": (),
        "rows": (4, WIDTH),
        "matrix": (WIDTH, WIDTH),
        "last": (WIDTH, WIDTH),
        "left": (4, 4),
    }.items()
} | {"axis": np.array([-1]), "heads": np.array([2, 2, 2, 3]), "flat": np.array([4, WIDTH])}
VALUES = """m = MatMul (x, matrix)
v = Add (m, shift)
"""
ATTENTION = """qr = Reshape (x, heads)
q = Transpose <perm = [0, 2, 1, 3]> (qr)
k = Transpose <perm = [0, 2, 3, 1]> (qr)
scores = MatMul (q, k)
p = Softmax (scores)
vr = Reshape (v, heads)
vt = Transpose <perm = [0, 2, 1, 3]> (vr)
mixed = MatMul (p, vt)
back = Transpose <perm = [0, 2, 1, 3]> (mixed)
t = Reshape (back, flat)"""


def graph(body: str, outputs: str = "y") -> ir.Model:
    """`body` over an input `x`; the node that reads the divided tensor `t` is the last."""
    given = ", ".join(f"float[4, {WIDTH}] {name}" for name in outputs.split())
    text = f'<ir_version: 9, opset_import: ["" : 20]>\ng (float[4, {WIDTH}] x) => ({given}) {{\n{body}\n}}'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in ARRAYS.items())
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
    model = onnx.shape_inference.infer_shapes(model)
    return ir.from_proto(model)


def divided(model: ir.Model, folder: Path) -> tuple[dict[str, object], list[dict[str, np.ndarray]]]:
    """Divide `t` for the node of `y`, and multiply its weights; the record, and the outputs before and after."""
    batch = {"x": np.random.default_rng(0).standard_normal((4, WIDTH)).astype(np.float32)}
    before = run_model(model, [batch], folder)[0]
    reader = next(node for node in model.graph if node.name == "node_y")
    value = reader.inputs[0]
    assert value is not None
    record = divide(model, value, [reader], makers(value, [reader], WIDTH), FACTORS)
    wide = ir.tensor(ARRAYS["last"] * FACTORS[:, None], name="wide")
    weight = ir.Value(name="wide", const_value=wide, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(wide.shape))
    model.graph.register_initializer(weight)
    reader.replace_input_with(1, weight)
    check_graph(model)
    return record, [before, run_model(model, [batch], folder)[0]]


@pytest.mark.parametrize(
    ("body", "into"),
    [
        ("t = LayerNormalization (x, gain, shift)", ["t"]),
        ("t = LayerNormalization (x, gain)", ["t"]),
        ("n = Tanh (x)\nt = Mul (n, gain)", ["t"]),
        ("n = Tanh (x)\nt = Mul (scalar, n)", ["t"]),
        ("n = Tanh (x)\ng = Mul (n, gain)\nt = Add (g, shift)", ["g", "t"]),
        ("n = Tanh (x)\ng = Mul (gain, n)\nt = Add (one, g)", ["g", "t"]),
        ("m = MatMul (x, matrix)\nt = Add (shift, m)", ["m", "t"]),
        ("t = MatMul (x, matrix)", ["t"]),
        ("t = Gemm (x, matrix, shift)", ["t"]),
        ("t = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, matrix, rows)", ["t"]),
        ("t = Gemm <transB = 1> (x, matrix)", ["t"]),
        ("m = MatMul (x, matrix)\na = Add (m, shift)\nt = Relu (a)", ["m", "a"]),
        (VALUES + ATTENTION, ["m", "v"]),
    ],
)
def test_folded(body: str, into: list[str], tmp_path: Path) -> None:
    model = graph(f"{body}\ny = MatMul (t, last)")
    count = len(model.graph)
    record, (before, after) = divided(model, tmp_path)
    assert record == {"activation": "t", "how": "folded", "into": [f"node_{name}" for name in into]}
    assert len(model.graph) == count
    np.testing.assert_allclose(after["y"], before["y"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("body", "outputs", "why"),
    [
        ("t = LayerNormalization (x, gain, shift)\nz = Add (t, x)", "y z", "'node_z' (Add) reads 't' too"),
        ("t = LayerNormalization (x, gain, shift)", "y t", "'t' is an output of the graph"),
        ("t = Gelu (x)", "y", "no constants of 'node_t' (Gelu) make 't'"),
        ("t = Add (x, shift)", "y", "'x' is an input of the graph"),
        ("m = MatMul (x, matrix)\nt = Add (m, x)", "y", "no constants of 'node_t' (Add) make 't'"),
        ("m = MatMul (x, matrix)\nt = Add (m, shift)\nz = Neg (m)", "y z", "not only 'node_t' (Add) reads 'm'"),
        ("m = MatMul (x, matrix)\nt = Relu (m)", "y m", "not only 'node_t' (Relu) reads 'm'"),
        (
            "m = ReduceMax <keepdims = 1> (x, axis)\nt = Add (m, shift)",
            "y",
            "what 'node_t' (Add) reads has other channels",
        ),
        ("t = MatMul (left, x)", "y", "no constants of 'node_t' (MatMul) make 't'"),
        (f"v = Tanh (x)\n{ATTENTION}", "y", "no constants of 'node_v' (Tanh) make 'v'"),
        (f"{VALUES}{ATTENTION}\nz = Neg (v)", "y z", "not only 'node_vr' (Reshape) reads 'v'"),
        (f"{VALUES}{ATTENTION}\nzr = Neg (vt)\nz = Reshape (zr, flat)", "y z", "no constants of 'node_t' (Reshape)"),
        (
            VALUES
            + ATTENTION.replace("back = Transpose <perm = [0, 2, 1, 3]>", "back = Transpose <perm = [0, 1, 2, 3]>"),
            "y",
            "no constants of 'node_t' (Reshape)",
        ),
    ],
)
def test_inserted(body: str, outputs: str, why: str, tmp_path: Path) -> None:
    model = graph(f"{body}\ny = MatMul (t, last)", outputs)
    count = len(model.graph)
    record, (before, after) = divided(model, tmp_path)
    assert (record["activation"], record["how"]) == ("t", "inserted")
    assert why in str(record["why"])
    assert len(model.graph) == count + 1
    for name in outputs.split():
        np.testing.assert_allclose(after[name], before[name], rtol=1e-4, atol=1e-5)
