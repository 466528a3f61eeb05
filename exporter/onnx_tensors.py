"""The tensors of an ONNX file as it lies on disk: where their data is, and whether all of it is there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.errors import RequestError

if TYPE_CHECKING:
    import onnx


def tensors(model: onnx.ModelProto) -> Iterator[tuple[onnx.TensorProto, bool]]:
    """Every tensor that may have its data in a file, and whether it is an initializer; subgraphs and functions too."""
    parts: list[Any] = [model.graph, *model.functions]
    while parts:
        part = parts.pop()
        yield from ((tensor, True) for tensor in getattr(part, "initializer", ()))
        for node in part.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t, False
                yield from ((tensor, False) for tensor in attribute.tensors)
                parts.extend((attribute.g, *attribute.graphs))


def check_tensors(model: onnx.ModelProto, path: Path) -> tuple[str, ...]:
    """Check that every tensor of the model at `path` has all of its data.

    Returns:
        The files with external data, relative to the model's folder.

    Raises:
        RequestError: A tensor is truncated, sparse or of no known type, or its file is missing, too short or outside
            the model's folder.
    """
    _refuse_sparse(model, path)
    return tuple(sorted({place for tensor, _ in tensors(model) if (place := _check_tensor(tensor, path)) is not None}))


def take_inside(model: onnx.ModelProto, path: Path) -> None:
    """Read the external data of nodes' own tensors, in place: only those of initializers can stay in their file."""
    import onnx

    for tensor, is_initializer in tensors(model):
        if is_initializer or tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        with (path.parent / entries["location"]).open("rb") as file:
            file.seek(int(entries.get("offset", 0)))
            tensor.raw_data = file.read(_bytes_of(tensor))
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")


def _refuse_sparse(model: onnx.ModelProto, path: Path) -> None:
    """Refuse sparse tensors, which onnx_ir would drop in silence."""
    parts: list[Any] = [model.graph, *model.functions]
    while parts:
        part = parts.pop()
        names = [tensor.values.name for tensor in getattr(part, "sparse_initializer", ())]
        for node in part.node:
            for attribute in node.attribute:
                parts.extend((attribute.g, *attribute.graphs))
                if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                    names.append(node.output[0] if node.output else node.op_type)
        if names:
            raise RequestError(
                "the ONNX file holds a sparse tensor, which is not supported",
                f"{names[0]!r} in {path}",
                "Store it as an ordinary initializer",
            )


def _elements(tensor: onnx.TensorProto) -> int:
    return math.prod(tensor.dims)


def _bytes_of(tensor: onnx.TensorProto) -> int:
    import onnx_ir as ir

    return (_elements(tensor) * ir.DataType(tensor.data_type).bitwidth + 7) // 8


def _check_typed_data(tensor: onnx.TensorProto, path: Path) -> None:
    """Refuse a tensor whose numbers, kept one by one in a field of their type, are not as many as its shape says."""
    import onnx
    import onnx_ir as ir

    field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
    needed = _elements(tensor)
    if tensor.data_type in (onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128):
        needed *= 2
    elif tensor.data_type != onnx.TensorProto.STRING and ir.DataType(tensor.data_type).bitwidth < 8:
        needed = _bytes_of(tensor)  # packed, one byte per number
    if len(getattr(tensor, field)) != needed:
        raise RequestError(
            "a tensor of the ONNX file is truncated",
            f"{tensor.name!r} in {path}: {len(getattr(tensor, field))} of {needed} numbers",
            "Export or download it again",
        )


def _check_tensor(tensor: onnx.TensorProto, path: Path) -> str | None:
    """Check one tensor; the file that its data is in, relative to the model's folder, if it is in one."""
    import onnx

    try:
        needed = 0 if tensor.data_type == onnx.TensorProto.STRING else _bytes_of(tensor)
    except (ValueError, TypeError) as error:
        raise RequestError("a tensor of the ONNX file has no known type", tensor.name, "Export it again") from error
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        if not tensor.HasField("raw_data"):
            _check_typed_data(tensor, path)
        elif len(tensor.raw_data) != needed:
            raise RequestError(
                "a tensor of the ONNX file is truncated",
                f"{tensor.name!r} in {path}: {len(tensor.raw_data)} of {needed} bytes",
                "Export or download it again",
            )
        return None
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
    return location
