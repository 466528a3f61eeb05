"""What is checked after every graph pass: the graph is legal ONNX, keeps its interface, and computes the same."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.errors import InternalError

if TYPE_CHECKING:
    import onnx_ir as ir

_MIN_EXTERNAL_TENSOR_BYTES = 1024


@dataclass(frozen=True)
class Difference:
    """How far one output is from its reference over all samples.

    Attributes:
        output: Name of the output.
        max_abs: Largest absolute difference.
        rms_relative: ``||a - b|| / ||a||`` with `a` the reference, the worst of the samples. Zero where both are
            equal, infinite where the reference is zero and the output is not.
        same_special: NaN and infinities are at the same places; integer and boolean outputs are equal.
    """

    output: str
    max_abs: float
    rms_relative: float
    same_special: bool


def check_graph(model: ir.Model) -> None:
    """Run the ONNX checker with full shape inference; the weights are left out of it, so size does not matter.

    Raises:
        InternalError: With the checker's message.
    """
    import onnx
    from onnx_ir.passes.common import CheckerPass

    try:
        CheckerPass(full_check=True)(model)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InternalError("the graph is not legal ONNX", str(error).strip(), None) from error


def run_model(
    model: ir.Model, samples: Sequence[Mapping[str, np.ndarray]], folder: Path
) -> list[dict[str, np.ndarray]]:
    """Run `model` as it is written: ONNX Runtime on the CPU with its own graph optimizations off.

    The session is opened from a file in `folder` whose weights ONNX Runtime maps into memory, so that a large model
    is never in memory twice, and closed before this returns.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 3
    with _session_file(model, folder) as path:
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            names = [output.name for output in session.get_outputs()]
            wanted = {value.name for value in session.get_inputs()}
            feeds = ({name: array for name, array in sample.items() if name in wanted} for sample in samples)
            return [dict(zip(names, session.run(names, feed), strict=True)) for feed in feeds]
        except _runtime_errors() as error:
            raise InternalError("ONNX Runtime cannot run the graph", str(error).strip(), None) from error


def compare(expected: Sequence[Mapping[str, Any]], actual: Sequence[Mapping[str, Any]]) -> list[Difference]:
    """Per output, the worst difference over the samples."""
    differences = []
    for name in expected[0] if expected else ():
        pairs = [(np.asarray(e[name]), np.asarray(a[name])) for e, a in zip(expected, actual, strict=True)]
        measured = [_difference(name, a, b) for a, b in pairs]
        differences.append(
            Difference(
                name,
                max(d.max_abs for d in measured),
                max(d.rms_relative for d in measured),
                all(d.same_special for d in measured),
            )
        )
    return differences


def interface(model: ir.Model) -> dict[str, tuple[Any, ...]]:
    """Names, element types and ranks of inputs and outputs in order: what no pass may change.

    Weights that old models list among their inputs are no inputs.
    """

    def describe(values: Sequence[ir.Value]) -> tuple[Any, ...]:
        return tuple((v.name, v.dtype, None if v.shape is None else len(v.shape)) for v in values)

    fed = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    return {"inputs": describe(fed), "outputs": describe(model.graph.outputs)}


def structure(model: ir.Model) -> tuple[Any, ...]:
    """A value that changes whenever a pass changes nodes, edges, attributes or weights of the graph."""
    nodes = tuple(
        (id(node), node.op_type, tuple(map(id, node.inputs)), tuple(map(id, node.attributes.values())))
        for node in model.graph.all_nodes()
    )
    weights = tuple(
        (name, id(value.const_value)) for graph in model.graphs() for name, value in graph.initializers.items()
    )
    return nodes, weights, tuple(map(id, model.graph.outputs))


def _difference(name: str, reference: np.ndarray, value: np.ndarray) -> Difference:
    if reference.shape != value.shape or reference.dtype != value.dtype:
        return Difference(name, float("inf"), float("inf"), False)
    if reference.dtype.kind not in "fcV":
        same = bool(np.array_equal(reference, value))
        return Difference(name, 0.0 if same else float("inf"), 0.0 if same else float("inf"), same)
    a, b = reference.astype(np.float64), value.astype(np.float64)
    finite = np.isfinite(a)
    same = bool(np.array_equal(a[~finite], b[~finite], equal_nan=True) and np.isfinite(b[finite]).all())
    if not same:
        return Difference(name, float("inf"), float("inf"), False)
    delta = a[finite] - b[finite]
    norm, error = float(np.linalg.norm(a[finite])), float(np.linalg.norm(delta))
    relative = error / norm if norm else (0.0 if error == 0 else float("inf"))
    return Difference(name, float(np.abs(delta).max(initial=0.0)), relative, True)


@contextmanager
def _session_file(model: ir.Model, folder: Path) -> Iterator[Path]:
    """`model` as a small file in `folder` beside its weights: linked where they are in a file already, else written."""
    import onnx_ir as ir

    originals: list[tuple[ir.Value, Any]] = []
    links: dict[str, str] = {}
    made: list[Path] = []
    path, data = folder / "check.onnx", folder / "check.onnx_data"
    try:
        with data.open("wb") as file:
            made.append(data)
            for value in itertools.chain.from_iterable(g.initializers.values() for g in model.graphs()):
                tensor = value.const_value
                if tensor is None or tensor.nbytes < _MIN_EXTERNAL_TENSOR_BYTES or tensor.dtype == ir.DataType.STRING:
                    continue
                if isinstance(tensor, ir.ExternalTensor):
                    source = os.path.realpath(tensor.path)
                    if source not in links:
                        links[source] = f"check-{len(links)}.onnx_data"
                        made.append(folder / links[source])
                        _link(source, folder / links[source])
                    location, offset = links[source], tensor.offset
                else:
                    location, offset = data.name, file.tell()
                    file.write(tensor.tobytes())
                originals.append((value, tensor))
                value.const_value = ir.ExternalTensor(
                    location, offset, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=value.name, base_dir=folder
                )
        made.append(path)
        ir.save(model, path, format="protobuf")
        for value, tensor in originals:
            value.const_value = tensor
        originals.clear()
        yield path
    finally:
        for value, tensor in originals:
            value.const_value = tensor
        for file_made in made:
            file_made.unlink(missing_ok=True)


def _link(source: str, link: Path) -> None:
    """A hard link, because ONNX Runtime refuses weights outside the model's folder; a copy across file systems."""
    link.unlink(missing_ok=True)
    try:
        os.link(source, link)
    except OSError:
        shutil.copyfile(source, link)


def _runtime_errors() -> tuple[type[Exception], ...]:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "RuntimeException")
    return tuple(getattr(state, name) for name in names)
