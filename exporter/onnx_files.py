"""ONNX models on disk: checked loading, deterministic saving, and the removal of what exporters leave in the file."""

from __future__ import annotations

import ast
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.errors import EnvironmentLackError, RequestError

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

EXTERNAL_DATA_THRESHOLD_BYTES = 1_800_000_000
"""Weights above this go to a file beside the model: protobuf refuses messages of 2 GiB, and the graph needs room."""

_MIN_EXTERNAL_TENSOR_BYTES = 1024
_PRODUCER = "planish"
_SCOPES_KEY = "pkg.torch.onnx.name_scopes"


def external_data_name(path: Path) -> str:
    """The name of the file that holds the weights of the model at `path`.

    ``model.onnx`` gives ``model.onnx_data``: the name that optimum, sentence-transformers and transformers.js look for.
    """
    return f"{path.stem}.onnx_data"


def load_model(path: Path | str) -> ir.Model:
    """Read an ONNX model; external weights stay in their file and are memory-mapped when used.

    Raises:
        RequestError: The file is missing, empty or truncated, is no ONNX model, or its external data is missing, too
            short, or lies outside the model's own folder.
    """
    import onnx
    import onnx_ir as ir
    from google.protobuf.message import DecodeError

    path = Path(path)
    if not path.is_file():
        raise RequestError("the ONNX file does not exist", path, "Give the path of a .onnx file")
    try:
        proto = onnx.load_model(str(path), format="protobuf", load_external_data=False)
    except (DecodeError, RuntimeError) as error:
        raise RequestError("the ONNX file is truncated or damaged", path, "Export or download it again") from error
    if not proto.opset_import or not proto.graph.output:
        raise RequestError("the file holds no ONNX graph (it is empty or truncated)", path, "Export it again")
    for tensor in _tensors(proto):
        _check_tensor(tensor, path)
    try:
        model = ir.serde.deserialize_model(proto)
    except (ValueError, KeyError, TypeError, AttributeError, ir.serde.SerdeError) as error:
        raise RequestError("the ONNX graph is not well formed", path, "Export it again") from error
    ir.external_data.set_base_dir(model.graph, path.parent.resolve())
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = _at_its_real_place(value.const_value)
    return model


def save_model(model: ir.Model, path: Path | str, *, external_data: bool | None = None) -> Path:
    """Write `model` to `path`; equal models give equal bytes.

    Weights are streamed from where they are (often a memory-mapped file), one tensor at a time. Both files are
    written beside `path` first and moved into place when complete. After saving a model over the files that it was
    loaded from, load it again: its weights are read lazily.

    Args:
        model: Left as it is.
        path: The file to write.
        external_data: Whether weights go to `external_data_name` beside `path`; ``None`` decides by size
            (`EXTERNAL_DATA_THRESHOLD_BYTES`).

    Returns:
        `path`.

    Raises:
        EnvironmentLackError: No space is left on the disk.
    """
    import onnx_ir as ir

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sidecar = external_data_name(path)
    if external_data is None:
        external_data = weight_bytes(model) > EXTERNAL_DATA_THRESHOLD_BYTES
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        if external_data:
            ir.save(
                model,
                staging / path.name,
                format="protobuf",
                external_data=sidecar,
                size_threshold_bytes=_MIN_EXTERNAL_TENSOR_BYTES,
            )
        else:
            _save_embedded(model, staging / path.name)
        if (staging / sidecar).exists():
            os.replace(staging / sidecar, path.parent / sidecar)
        os.replace(staging / path.name, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise EnvironmentLackError("no space is left to write the ONNX model", path, "Free some disk space") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return path


def weight_bytes(model: ir.Model) -> int:
    """Size of all initializers, in bytes; a tensor that several initializers share counts once."""
    tensors = {
        id(value.const_value): value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    }
    return sum(tensors.values())


def has_embedded_weights(model: ir.Model) -> bool:
    """Whether any tensor worth a file of its own is inside the model's own file (or in memory)."""
    import onnx_ir as ir

    return any(
        value.const_value is not None
        and not isinstance(value.const_value, ir.ExternalTensor)
        and value.const_value.nbytes >= _MIN_EXTERNAL_TENSOR_BYTES
        for graph in model.graphs()
        for value in graph.initializers.values()
    )


def strip_metadata(model: ir.Model) -> None:
    """Remove, in place, what exporters leave in a model and what would differ between two machines.

    Doc strings, metadata (stack traces, source paths, the exporter's own graph signature) and the producer go. Before
    they go, the module path that the PyTorch exporter recorded names the nodes, so that a node is called
    ``encoder.layer.0.attention.self.query/MatMul`` and reports stay readable.
    """
    import onnx_ir as ir

    name_nodes_by_module(model)
    model.producer_name, model.producer_version = _PRODUCER, None
    model.domain, model.model_version, model.doc_string = None, None, None
    model.metadata_props.clear()
    model.graph.name = "main"
    for function in model.functions.values():
        function.metadata_props.clear()
        function.doc_string = None
    for graph in model.graphs():
        graph.metadata_props.clear()
        graph.doc_string = None
        values = [*graph.inputs, *graph.initializers.values()]
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            values.extend(node.outputs)
            for attribute in node.attributes.values():
                attribute.doc_string = None
        for value in values:
            value.metadata_props.clear()
            value.doc_string = None
            tensor = value.const_value
            if tensor is not None and tensor.doc_string:
                value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)


def name_nodes_by_module(model: ir.Model) -> None:
    """Name nodes, in place, ``<module path>/<operator>`` where the exporter recorded the module path.

    Other nodes keep their names; a name that is taken already gets a number behind it. All names end up unique.
    """
    taken: dict[str, int] = {}
    for node in model.graph.all_nodes():
        scope = _module_scope(node.metadata_props.get(_SCOPES_KEY))
        wanted = node.name or node.op_type if scope is None else f"{scope}/{node.op_type}".lstrip("/")
        node.name = _free_name(wanted, taken)


def rename_axes(model: ir.Model, axes: dict[str, dict[int, str]]) -> None:
    """Give the dynamic axes of the inputs their names, in place, everywhere in the graph.

    Args:
        model: Exported with whatever symbols the exporter chose (``s18``) or none.
        axes: Per input name, the axis index and the name that it gets, as ``{"input_ids": {0: "batch"}}``.
    """
    import onnx_ir as ir

    renamed: dict[str, str] = {}
    for value in model.graph.inputs:
        for index, name in axes.get(value.name or "", {}).items():
            if value.shape is None or isinstance(value.shape[index], int):
                continue
            symbol = value.shape[index].value
            if symbol is None:
                value.shape[index] = ir.SymbolicDim(name)
            else:
                renamed[symbol] = name
    if not renamed:
        return
    words = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in sorted(renamed, key=len, reverse=True)))
    for graph in model.graphs():
        nodes = (output for node in graph for output in node.outputs)
        for value in {id(v): v for v in (*graph.inputs, *graph.outputs, *nodes)}.values():
            shape = value.shape
            if shape is None:
                continue
            dims = [d if isinstance(d, int) else d.value for d in shape]
            new = [words.sub(lambda m: renamed[m.group()], d) if isinstance(d, str) else d for d in dims]
            if new != dims:
                value.shape = ir.Shape(new)


def _at_its_real_place(tensor: ir.ExternalTensor) -> ir.ExternalTensor:
    """`tensor`, read from the file that its path leads to: onnx_ir follows no links out of the model's folder."""
    import onnx_ir as ir

    real = Path(tensor.path).resolve()
    if real == Path(tensor.path):
        return tensor
    return ir.ExternalTensor(
        real.name,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=ir.Shape(tensor.shape),
        name=tensor.name or "",
        base_dir=real.parent,
    )


def _save_embedded(model: ir.Model, path: Path) -> None:
    import onnx_ir as ir

    # `ir.save` would keep references to external files: the weights are to be inside, so each is wrapped in a tensor
    # that reads its bytes when they are written.
    originals = []
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                originals.append((value, value.const_value))
                value.const_value = ir.Tensor(value.const_value.numpy(), dtype=value.const_value.dtype, name=value.name)
    try:
        ir.save(model, path, format="protobuf")
    finally:
        for value, tensor in originals:
            value.const_value = tensor


def _free_name(wanted: str, taken: dict[str, int]) -> str:
    if wanted not in taken:
        taken[wanted] = 0
        return wanted
    while True:
        taken[wanted] += 1
        candidate = f"{wanted}_{taken[wanted]}"
        if candidate not in taken:
            taken[candidate] = 0
            return candidate


def _module_scope(recorded: str | None) -> str | None:
    """``"['', 'm', 'm.encoder', 'linear_3']"`` -> ``"m.encoder"``: the last entry is the operation, not a module."""
    if not recorded:
        return None
    try:
        scopes = ast.literal_eval(recorded)
    except (ValueError, SyntaxError):
        return None
    if not isinstance(scopes, list) or len(scopes) < 2 or not isinstance(scopes[-2], str):
        return None
    return scopes[-2]


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    from onnx.external_data_helper import _get_all_tensors

    return _get_all_tensors(proto)


def _check_tensor(tensor: Any, path: Path) -> None:
    import onnx
    import onnx_ir as ir

    try:
        bits = ir.DataType(tensor.data_type).bitwidth
    except (ValueError, TypeError) as error:
        if tensor.data_type == onnx.TensorProto.STRING:
            return
        raise RequestError("a tensor of the ONNX file has no known type", tensor.name, "Export it again") from error
    elements = 1
    for dim in tensor.dims:
        elements *= dim
    needed = (elements * bits + 7) // 8
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        if tensor.HasField("raw_data") and len(tensor.raw_data) != needed:
            raise RequestError(
                "a tensor of the ONNX file is truncated",
                f"{tensor.name!r} in {path}: {len(tensor.raw_data)} of {needed} bytes",
                "Export or download it again",
            )
        return
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    folder = path.parent.resolve()
    data = (folder / location).resolve()
    # In a cache where both files are links to the same store, the store's folder is the model's own.
    allowed = (folder, path.resolve().parent)
    if not location or Path(location).is_absolute() or not any(data.is_relative_to(place) for place in allowed):
        raise RequestError(
            "the ONNX file refers to external data outside its folder",
            f"{location!r} in {path}",
            "Put the data file beside the model and export it again",
        )
    if not data.is_file():
        raise RequestError(
            "the external data of the ONNX file is missing", data, "Copy it beside the model, under this name"
        )
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", needed))
    except ValueError as error:
        raise RequestError("the ONNX file's external data entry is damaged", tensor.name, "Export it again") from error
    if offset < 0 or length != needed or offset + length > data.stat().st_size:
        raise RequestError(
            "the external data of the ONNX file is too short",
            f"{data}: tensor {tensor.name!r} needs {needed} bytes at {offset}",
            "Export or download it again",
        )
