"""A small encoder with real products, residuals and attention, as an optimized FP32 graph, and inputs for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from exporter.artifact import Artifact, InputContract, Signature, Variant
from exporter.digests import file_digest
from exporter.targets import get_target
from exporter.targets.base import Session

Batch = dict[str, np.ndarray]
WIDTH, INNER, HEADS = 32, 64, 4

TEXT = """
<ir_version: 9, opset_import: ["" : 20]>
encoder (float[batch, sequence, 32] x) => (float[batch, sequence, 32] y) {
  normed = LayerNormalization <axis = -1> (x, gain, shift)
  q0 = MatMul (normed, wq)
  q = Add (q0, bq)
  k0 = MatMul (normed, wk)
  k = Add (k0, bk)
  v0 = MatMul (normed, wv)
  v = Add (v0, bv)
  qh0 = Reshape (q, heads)
  qh = Transpose <perm = [0, 2, 1, 3]> (qh0)
  kh0 = Reshape (k, heads)
  kh = Transpose <perm = [0, 2, 3, 1]> (kh0)
  vh0 = Reshape (v, heads)
  vh = Transpose <perm = [0, 2, 1, 3]> (vh0)
  scores = MatMul (qh, kh)
  probabilities = Softmax <axis = -1> (scores)
  mixed = MatMul (probabilities, vh)
  back = Transpose <perm = [0, 2, 1, 3]> (mixed)
  joined = Reshape (back, flat)
  o0 = MatMul (joined, wo)
  o = Add (bo, o0)
  residual = Add (o, x)
  up0 = MatMul (residual, wu)
  up = Add (up0, bu)
  active = Gelu (up)
  down0 = MatMul (active, wd)
  down = Add (down0, bd)
  y = Add (down, residual)
}
"""


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32)

    made = {f"w{n}": matrix(WIDTH, WIDTH) for n in "qkvo"}
    made |= {f"b{n}": (rng.standard_normal(WIDTH) * 0.1).astype(np.float32) for n in "qkvod"}
    made |= {"wu": matrix(WIDTH, INNER), "bu": (rng.standard_normal(INNER) * 0.1).astype(np.float32)}
    made |= {"wd": matrix(INNER, WIDTH), "gain": np.ones(WIDTH, np.float32), "shift": np.zeros(WIDTH, np.float32)}
    made |= {"heads": np.array([0, 0, HEADS, WIDTH // HEADS]), "flat": np.array([0, 0, WIDTH])}
    return made


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    model = onnx.parser.parse_model(TEXT)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights().items())
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{node.output[0]}" if node.op_type == "MatMul" else f"node_{number}"
    onnx.checker.check_model(model, full_check=True)
    path = tmp_path / "encoder.onnx"
    onnx.save(model, path)
    return path


def batches(count: int = 6, seed: int = 3) -> Iterator[Batch]:
    rng = np.random.default_rng(seed)
    for number in range(count):
        yield {"x": rng.standard_normal((1 + number % 3, 4 + number, WIDTH)).astype(np.float32)}


def run(path: Path, batch: Batch, *names: str) -> list[np.ndarray]:
    """Outputs of a graph, and of inner tensors by name, in ONNX Runtime."""
    import onnxruntime as ort

    model = onnx.load(path)
    known = {output.name for output in model.graph.output}
    for name in names:
        if name not in known:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(list(names) or ["y"], batch)


def rms(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def compiled(program: Path, signature: Signature, form: str, folder: Path) -> Session:
    """A quantized program, compiled by AOTInductor and opened."""
    target, variant = get_target("inductor-cpu"), Variant("inductor-cpu", "int8", form)
    folder.mkdir()
    engine = target.build(Artifact(program, "pt2", signature, InputContract()), variant, folder)[0]
    opened = Artifact(engine, "aoti", signature, InputContract())
    return target.open(opened, variant, threads=1, trusted_digests=frozenset([file_digest(engine)]))
