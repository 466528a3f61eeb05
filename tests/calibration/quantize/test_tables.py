"""Embedding tables as int8: restored rows to the bit, what stays in FP32, and that runtimes keep the integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from calibration.collect import collect
from calibration.quantize import tables
from calibration.quantize.dynamic import quantize_dynamic
from calibration.quantize.products import observed
from calibration.quantize.qdq import SCHEMES, quantize_static
from calibration.table import CalibrationTable
from exporter.onnx_files import load_model, save_model

from .conftest import Batch, run

ROWS, COLUMNS = 4096, 64  # 1 MiB in FP32, and of the inputs a product reads the gathered rows directly
HEAD = '<ir_version: 9, opset_import: ["" : 20]>\n'
PLAIN = """
g (int64[batch, sequence] ids, int32[batch, sequence] kinds) => (float[batch, sequence, 32] y) {
  words = Gather (table, ids)
  kind = Gather (small, kinds)
  mixed = MatMul (words, weight)
  added = Add (mixed, bias)
  y = Add (added, kind)
}
"""
TIED = """
g (int64[batch, sequence] ids) => (float[batch, sequence, 4096] y) {
  words = Gather (table, ids)
  mixed = MatMul (words, square)
  turned = Transpose <perm = [1, 0]> (table)
  y = MatMul (mixed, turned)
}
"""
TIED_GEMM = """
g (int64[batch] ids) => (float[batch, 4096] y) {
  words = Gather (table, ids)
  mixed = MatMul (words, square)
  y = Gemm <transB = 1> (mixed, table)
}
"""


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"small": (8, 32), "weight": (COLUMNS, 32), "bias": (32,), "square": (COLUMNS, COLUMNS)}
    made = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    loudness = np.exp(rng.standard_normal((ROWS, 1)))  # rows of different size, as frequent and rare words have
    made["table"] = (rng.standard_normal((ROWS, COLUMNS)) * loudness).astype(np.float32)
    return made


def written(folder: Path, text: str, values: dict[str, np.ndarray] | None = None, *, beside: bool = False) -> Path:
    model = onnx.parser.parse_model(HEAD + text)
    read = {name for node in model.graph.node for name in node.input}
    for name, array in (values or arrays()).items():
        if name in read:
            model.graph.initializer.append(numpy_helper.from_array(array, name))
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
    path = folder / "model.onnx"
    onnx.save(model, path)
    if beside:
        save_model(load_model(path), path, external_data=True)
    return path


def ids(count: int = 4, seed: int = 1) -> list[Batch]:
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        shape = (1 + number % 2, 5 + number)
        made.append({"ids": rng.integers(-ROWS, ROWS, shape), "kinds": rng.integers(0, 8, shape).astype(np.int32)})
    return made


def ranges(path: Path, batches: list[Batch]) -> CalibrationTable:
    return collect(path, lambda: batches, observed(load_model(path)))


def constants(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def restored(table: np.ndarray) -> np.ndarray:
    """Row by row, without the code under test."""
    rows = []
    for row in table:
        step = np.float32(np.abs(row).max() / np.float32(127)) or np.float32(1)
        rows.append(np.clip(np.round(row / step), -127, 127).astype(np.float32) * step)
    return np.stack(rows)


@pytest.mark.parametrize("form", ["dynamic", "static"])
def test_gathered_rows_are_the_dequantized_ones_exactly(tmp_path: Path, form: str) -> None:
    path, out = written(tmp_path, PLAIN), tmp_path / "int8.onnx"
    if form == "dynamic":
        record = quantize_dynamic(path, out)
    else:
        record = quantize_static(path, out, ranges(path, ids()), SCHEMES["openvino-cpu"])
    table = arrays()["table"]
    expected = restored(table)
    for batch in ids(6, seed=5):  # negative ids too
        np.testing.assert_array_equal(run(out, batch, "words")[0], expected[batch["ids"]])
        np.testing.assert_array_equal(run(out, batch, "kind")[0], run(path, batch, "kind")[0])
    assert record["tables"] == [
        {
            "node": "node_words",
            "rows": ROWS,
            "columns": COLUMNS,
            "rms_relative": pytest.approx(np.linalg.norm(expected - table) / np.linalg.norm(table), rel=1e-5),
            "bytes_before": table.nbytes,
            "bytes_after": table.nbytes // 4 + 4 * ROWS,
        }
    ]
    assert record["kept"] == []
    assert [entry["node"] for entry in record["quantized"]] == ["node_mixed"]
    stored = constants(out)
    assert "table" not in stored
    assert stored["table_quantized"].dtype == np.int8
    np.testing.assert_array_equal(stored["small"], arrays()["small"])
    assert out.stat().st_size < path.stat().st_size / 3


@pytest.mark.parametrize("kind", ["int64", "int32"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 1, 3)])
def test_ids_of_any_shape(tmp_path: Path, kind: str, shape: tuple[int, ...]) -> None:
    axes = ", ".join(f"d{n}" for n in range(len(shape)))
    rank, out_rank = f"[{axes}]" if axes else "", f"[{axes}, 64]" if axes else "[64]"
    text = f"""
    g ({kind}{rank} ids, float[n, 64] x) => (float{out_rank} words, float[n, 32] y) {{
      words = Gather (table, ids)
      y = MatMul (x, weight)
    }}"""
    path, out = written(tmp_path, text), tmp_path / "int8.onnx"
    quantize_dynamic(path, out)
    chosen = np.random.default_rng(2).integers(-ROWS, ROWS, shape).astype(kind)
    batch = {"ids": chosen, "x": np.ones((2, COLUMNS), np.float32)}
    np.testing.assert_array_equal(run(out, batch, "words")[0], restored(arrays()["table"])[chosen])


@pytest.mark.parametrize("form", ["dynamic", "static"])
def test_runtimes_keep_the_integers(tmp_path: Path, form: str) -> None:
    """Not folded back into floats when the file is opened: in the constants that each runtime holds then."""
    from openvino import Core

    path, out = written(tmp_path, PLAIN), tmp_path / "int8.onnx"
    if form == "dynamic":
        quantize_dynamic(path, out)
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        ort.InferenceSession(str(out), options, providers=["CPUExecutionProvider"])
        held = [(str(array.dtype), array.nbytes) for array in constants(tmp_path / "optimized.onnx").values()]
    else:
        quantize_static(path, out, ranges(path, ids()), SCHEMES["openvino-cpu"])
        compiled = Core().compile_model(str(out), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        held = []
        for operation in compiled.get_runtime_model().get_ops():
            if operation.get_rt_info()["layerType"].astype(str) == "Const":
                kind, shape = operation.get_element_type(), operation.get_output_shape(0)
                held.append(
                    ({"i8": "int8", "f32": "float32"}.get(kind.get_type_name()), int(np.prod(shape)) * kind.size)
                )
        found = compiled(ids()[0])
        np.testing.assert_allclose(found[compiled.outputs[0]], run(out, ids()[0])[0], atol=0.02)
    assert ("int8", ROWS * COLUMNS) in held
    assert max(size for dtype, size in held if dtype == "float32") < ROWS * COLUMNS


def test_table_that_two_nodes_gather_is_stored_once(tmp_path: Path) -> None:
    text = PLAIN.replace("added = ", "again = Gather (table, ids)\n  more = MatMul (again, weight)\n  added = ")
    path, out = written(tmp_path, text.replace("(mixed, bias)", "(mixed, more)")), tmp_path / "int8.onnx"
    record = quantize_dynamic(path, out)
    assert [entry["node"] for entry in record["tables"]] == ["node_words", "node_again"]
    assert [name for name, array in constants(out).items() if array.shape == (ROWS, COLUMNS)] == ["table_quantized"]
    np.testing.assert_array_equal(run(out, ids()[0], "again")[0], restored(arrays()["table"])[ids()[0]["ids"]])


def test_table_tied_to_a_projection_in_fp32_stays(tmp_path: Path) -> None:
    path, out = written(tmp_path, TIED), tmp_path / "int8.onnx"
    record = quantize_dynamic(path, out)
    assert record["tables"] == []
    assert [(entry["node"], entry["rule"]) for entry in record["kept"]] == [("node_words", "shared_table")]
    assert "node_turned (Transpose)" in record["kept"][0]["why"]
    assert [array.dtype for array in constants(out).values() if array.size == ROWS * COLUMNS] == [np.float32]


def test_table_tied_to_a_quantized_projection_is_stored_once(tmp_path: Path) -> None:
    path, out = written(tmp_path, TIED_GEMM), tmp_path / "int8.onnx"
    batches = [{"ids": batch["ids"].reshape(-1)} for batch in ids()]
    record = quantize_static(path, out, ranges(path, batches), SCHEMES["openvino-cpu"])
    assert [entry["node"] for entry in record["quantized"]] == ["node_mixed", "node_y"]
    assert [entry["node"] for entry in record["tables"]] == ["node_words"]
    assert [array.dtype for array in constants(out).values() if array.size == ROWS * COLUMNS] == [np.int8]
    np.testing.assert_array_equal(run(out, batches[0], "words")[0], restored(arrays()["table"])[batches[0]["ids"]])
    # Where the projection stays in FP32, so does the table.
    record = quantize_static(path, out, ranges(path, batches), SCHEMES["openvino-cpu"], keep=["node_y"])
    assert [entry["rule"] for entry in record["kept"]] == ["asked", "shared_table"]
    assert [array.dtype for array in constants(out).values() if array.size == ROWS * COLUMNS] == [np.float32]


def test_table_that_is_an_output_or_an_input_stays(tmp_path: Path) -> None:
    path = written(tmp_path, PLAIN)
    for place in ("output", "input"):
        model = onnx.load(path)
        getattr(model.graph, place).append(onnx.helper.make_tensor_value_info("table", 1, [ROWS, COLUMNS]))
        onnx.save(model, tmp_path / "changed.onnx")
        assert quantize_dynamic(tmp_path / "changed.onnx", tmp_path / "int8.onnx")["tables"] == []
        assert constants(tmp_path / "int8.onnx")["table"].dtype == np.float32


def test_small_tables_other_axes_and_fixed_ids_are_left_alone(tmp_path: Path) -> None:
    small = {**arrays(), "table": arrays()["table"][:-1]}
    assert quantize_dynamic(written(tmp_path, PLAIN, small), tmp_path / "a.onnx")["tables"] == []
    columns = PLAIN.replace("Gather (table, ids)", "Gather <axis = 1> (table, chosen)").replace(
        "words, weight", "joined, weight"
    )
    columns = columns.replace("mixed =", "some = Gather (words, ids)\n  joined = Reshape (some, shape)\n  mixed =")
    values = {**arrays(), "chosen": np.arange(COLUMNS), "shape": np.array([0, 0, COLUMNS])}
    record = quantize_dynamic(written(tmp_path, columns, values), tmp_path / "b.onnx")
    assert (record["tables"], record["kept"]) == ([], [])


def test_tables_that_would_save_next_to_nothing_are_left_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    large = {**arrays(), "weight": rng.standard_normal((COLUMNS, 90_000)).astype(np.float32)}  # 5.8 MB in int8
    large["bias"] = np.zeros(90_000, np.float32)
    text = PLAIN.replace("32] y", "90000] y").replace("Add (added, kind)", "Identity (added)")
    assert len(quantize_dynamic(written(tmp_path, text, large), tmp_path / "a.onnx")["tables"]) == 1
    large["weight"] = np.tile(large["weight"], 4)
    large["bias"] = np.tile(large["bias"], 4)
    text = text.replace("90000", "360000")
    assert quantize_dynamic(written(tmp_path, text, large), tmp_path / "b.onnx")["tables"] == []
    narrow = {**arrays(), "table": np.ones((1 << 16, 8), np.float32), "weight": np.ones((8, 32), np.float32)}
    assert quantize_dynamic(written(tmp_path, PLAIN, narrow), tmp_path / "c.onnx")["tables"] == []


def test_rows_of_zeros_and_of_next_to_nothing(tmp_path: Path) -> None:
    values = arrays()
    values["table"][3] = 0
    values["table"][4] = 1e-44  # no float is a hundredth of it
    values["table"][5] = np.float32(3e38)
    out = tmp_path / "int8.onnx"
    quantize_dynamic(written(tmp_path, PLAIN, values), out)
    batch = {"ids": np.array([[3, 4, 5]]), "kinds": np.zeros((1, 3), np.int32)}
    rows = run(out, batch, "words")[0][0]
    assert not rows[:2].any()
    np.testing.assert_allclose(rows[2], 3e38, rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_table_that_is_not_finite_stays(tmp_path: Path, value: float) -> None:
    values = arrays()
    values["table"][7, 1] = value
    record = quantize_dynamic(written(tmp_path, PLAIN, values), tmp_path / "int8.onnx")
    assert record["tables"] == []
    assert [entry["rule"] for entry in record["kept"]] == ["not_finite"]
    np.testing.assert_array_equal(constants(tmp_path / "int8.onnx")["table"], values["table"])


def test_weights_in_a_file_beside_the_graph(tmp_path: Path) -> None:
    path = written(tmp_path, PLAIN, beside=True)
    assert (tmp_path / "model.onnx_data").is_file()
    quantize_dynamic(path, tmp_path / "inside.onnx")
    (tmp_path / "beside").mkdir()
    out = tmp_path / "beside" / "int8.onnx"
    quantize_dynamic(path, out, external_data=True)
    inside, outside = constants(tmp_path / "inside.onnx"), constants(out)
    assert out.stat().st_size < 10_000
    for name in ("table_quantized", "table_row_scale"):
        np.testing.assert_array_equal(inside[name], outside[name])
    session = ort.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, ids()[0])[0], run(tmp_path / "inside.onnx", ids()[0])[0])


def test_same_bytes_twice_and_whatever_the_size_of_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, PLAIN)
    made: list[tuple[bytes, Any]] = []
    for size in (1 << 26, 1 << 26, 1000 * 4 * COLUMNS):
        monkeypatch.setattr(tables, "_CHUNK_BYTES", size)
        record = quantize_dynamic(path, tmp_path / "int8.onnx")
        made.append(((tmp_path / "int8.onnx").read_bytes(), record["tables"][0]["rms_relative"]))
    assert made[0] == made[1]
    assert made[2] == (made[0][0], pytest.approx(made[0][1]))


def test_who_keeps_floats(tmp_path: Path) -> None:
    path, out = written(tmp_path, PLAIN), tmp_path / "int8.onnx"
    learned = ranges(path, ids())
    for record in (
        quantize_dynamic(path, out, tables=False),
        quantize_static(path, out, learned, SCHEMES["tensorrt"]),
    ):
        assert (record["tables"], record["kept"]) == ([], [])
        np.testing.assert_array_equal(constants(out)["table"], arrays()["table"])
    record = quantize_static(path, out, learned, SCHEMES["openvino-cpu"], keep=["node_words"])
    assert [(entry["node"], entry["rule"]) for entry in record["kept"]] == [("node_words", "asked")]
    assert constants(out)["table"].dtype == np.float32
