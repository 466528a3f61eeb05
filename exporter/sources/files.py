"""Sources that are single files: exported programs (``.pt2``) and ONNX models."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exporter.digests import file_digest
from exporter.errors import RequestError
from exporter.sources.folder import read_json_files, read_licence, small_files
from exporter.sources.source import Source, bundle_name, digest_parts

# One of these beside an ONNX file means that what else is there belongs to it.
_MARKS = ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")


def resolve_pt2(spec: str, path: Path, *, trust: bool) -> Source:
    """A `torch.export` program. Loading one runs what it holds, so it needs the user's trust.

    Raises:
        RequestError: No such file, no trust, or no program archive.
    """
    _check_file(path)
    if not trust:
        raise RequestError(
            "a .pt2 program is code and is opened only when trusted",
            path,
            "Where you know its author, add --trust",
        )
    if not zipfile.is_zipfile(path):
        raise RequestError("the .pt2 file is truncated or no program archive", path, "Export it again")
    return Source(
        kind="pt2",
        spec=spec,
        path=path,
        name=bundle_name(path.stem),
        digest=digest_parts([("program", file_digest(path))]),
        weights_bytes=path.stat().st_size,
    )


def resolve_onnx(spec: str, path: Path) -> Source:
    """An ONNX model, with its external data, and with the configuration and tokenizer beside it, where it has any.

    These lie in the file's folder, or above it where that is called ``onnx``, as on the hub.

    Raises:
        RequestError: No such file, it does not parse, its external data is missing, too short or outside its folder, or
            a JSON file beside it is broken.
    """
    import onnx

    _check_file(path)
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError is not importable under one name across its versions
        raise RequestError("the ONNX file is truncated or corrupt", path, "Export or copy it again") from error
    if not model.graph.node or not model.graph.output:
        raise RequestError("the ONNX file is truncated or corrupt: it holds no graph", path, "Export or copy it again")
    external = check_external_data(model, path)
    tensors = [*_tensors(model)]
    beside = _beside(path)
    files = () if beside is None else small_files(beside)
    if beside is not None:
        read_json_files(beside, files)
    parts = [("model", file_digest(path)), *((n, file_digest(path.parent / n)) for n in external)]
    if beside is not None:
        parts += [(name, file_digest(beside / name)) for name in files]
    return Source(
        kind="onnx",
        spec=spec,
        path=path,
        name=bundle_name(_folder_of_model(path).resolve().name if path.stem == "model" else path.stem),
        digest=digest_parts(parts),
        licence=None if beside is None else read_licence(beside),
        weights_bytes=path.stat().st_size + sum((path.parent / name).stat().st_size for name in external),
        parameters=sum(math.prod(tensor.dims) for tensor in model.graph.initializer) if tensors else 0,
        files=files,
        weights=(path.name, *external),
        beside=beside,
    )


def _folder_of_model(path: Path) -> Path:
    """The folder that the model goes by: not ``onnx``, which is a folder in a model's folder."""
    folder = path.parent.absolute()
    return folder.parent if folder.name == "onnx" else folder


def _beside(path: Path) -> Path | None:
    places = dict.fromkeys([path.parent, _folder_of_model(path)])
    return next((place for place in places if any((place / name).is_file() for name in _MARKS)), None)


def check_external_data(model: Any, path: Path) -> tuple[str, ...]:
    """The external data files of an ONNX model, relative to its folder.

    Raises:
        RequestError: A file lies outside the model's folder, is missing, or is shorter than the model says.
    """
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    root = path.parent.resolve()
    found: set[str] = set()
    for tensor in _tensors(model):
        if not uses_external_data(tensor):
            continue
        info = ExternalDataInfo(tensor)
        file = path.parent / info.location
        if Path(info.location).is_absolute() or not file.resolve().is_relative_to(root):
            raise RequestError(
                "the ONNX file refers to external data outside its folder",
                f"{info.location} (tensor {tensor.name!r})",
                f"Put the data beside {path.name}",
            )
        if not file.is_file():
            raise RequestError("the ONNX file's external data is missing", file, f"Put it beside {path.name}")
        end = int(info.offset or 0) + int(info.length or 0)
        if end > file.stat().st_size:
            raise RequestError(
                "the ONNX file's external data is truncated",
                file,
                f"It has {file.stat().st_size} bytes, tensor {tensor.name!r} ends at {end}",
            )
        found.add(info.location)
    return tuple(sorted(found))


def _tensors(model: Any) -> Iterator[Any]:
    """Every tensor of the model: initializers and attributes, subgraphs and functions included."""
    graphs = [model.graph]
    nodes = [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield sparse.values
                yield sparse.indices
            nodes.extend(graph.node)
        while nodes:
            for attribute in nodes.pop().attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
                if attribute.HasField("g"):
                    graphs.append(attribute.g)
                graphs.extend(attribute.graphs)


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise RequestError("there is no such file", path, "Check the path")
