"""ONNX models on disk: checked loading, deterministic saving, and the removal of what exporters leave in the file."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.errors import NoSpaceError, RequestError
from exporter.onnx_names import name_nodes_by_module, strip_metadata
from exporter.onnx_tensors import check_tensors, take_inside

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

__all__ = [
    "EXTERNAL_DATA_THRESHOLD_BYTES",
    "external_data_name",
    "has_embedded_weights",
    "load_model",
    "name_nodes_by_module",
    "save_model",
    "strip_metadata",
    "weight_bytes",
]

EXTERNAL_DATA_THRESHOLD_BYTES = 1_800_000_000
"""Weights above this go to a file beside the model: protobuf refuses messages of 2 GiB, and the graph needs room."""

_MIN_EXTERNAL_TENSOR_BYTES = 1024


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
    check_tensors(proto, path)
    take_inside(proto, path)
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
        NoSpaceError: No space is left on the disk.
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
        raise NoSpaceError("no space is left to write the ONNX model", path, "Free some disk space") from error
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
    """Write a model with its weights inside the file, one tensor after the other.

    Protobuf's own way holds all of it several times in memory. The file is made of the same parts: what the library
    serializes without the weights, then each tensor as a field of the graph, in which order is free.
    """
    import onnx_ir as ir

    large = {
        value.name: value.const_value
        for value in model.graph.initializers.values()
        if value.const_value is not None
        and value.const_value.nbytes >= _MIN_EXTERNAL_TENSOR_BYTES
        and value.const_value.dtype != ir.DataType.STRING
    }
    inside = [value for graph in model.graphs() if graph is not model.graph for value in graph.initializers.values()]
    kept = [(v, v.const_value) for v in (*model.graph.initializers.values(), *inside)]
    try:
        for value, tensor in kept:
            if value.name in large and large[value.name] is tensor:
                value.const_value = ir.ExternalTensor(
                    "elsewhere", None, None, tensor.dtype, shape=ir.Shape(tensor.shape), name=str(value.name)
                )
            elif isinstance(tensor, ir.ExternalTensor):  # a reference to another file would be kept as it is
                value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)
        proto = ir.serde.serialize_model(model)
    finally:
        for value, tensor in kept:
            value.const_value = tensor
    _write_parts(proto, large, path)


def _write_parts(proto: onnx.ModelProto, large: Mapping[str | None, ir.TensorProtocol], path: Path) -> None:
    """Write `proto` with the bytes of `large`, by name, in those of its initializers."""
    heads = []
    for tensor in proto.graph.initializer:
        if tensor.name in large:
            tensor.ClearField("data_location")
            tensor.ClearField("external_data")
            heads.append((tensor.SerializeToString(deterministic=True), large[tensor.name]))
        else:
            heads.append((tensor.SerializeToString(deterministic=True), None))
    proto.graph.ClearField("initializer")
    graph = proto.graph.SerializeToString(deterministic=True)
    proto.ClearField("graph")

    def tensor_size(head: bytes, data: ir.TensorProtocol | None) -> int:
        return len(head) + (0 if data is None else len(_field("TensorProto", "raw_data", data.nbytes)) + data.nbytes)

    sizes = [tensor_size(head, data) for head, data in heads]
    starts = [_field("GraphProto", "initializer", size) for size in sizes]
    with path.open("wb") as file:
        file.write(proto.SerializeToString(deterministic=True))
        file.write(_field("ModelProto", "graph", len(graph) + sum(map(len, starts)) + sum(sizes)))
        file.write(graph)
        for start, (head, data) in zip(starts, heads, strict=True):
            file.write(start + head)
            if data is not None:
                file.write(_field("TensorProto", "raw_data", data.nbytes))
                file.write(data.tobytes())


def _field(message: str, name: str, size: int) -> bytes:
    """How protobuf announces a field of so many bytes: its number and kind, then the size, in groups of seven bits."""
    import onnx

    number = getattr(onnx, message).DESCRIPTOR.fields_by_name[name].number
    announced = bytearray([number << 3 | 2])  # every field's number here is below 16: one byte
    while size > 0x7F:
        announced.append(size & 0x7F | 0x80)
        size >>= 7
    announced.append(size)
    return bytes(announced)
