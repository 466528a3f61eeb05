"""Sources that are single files: exported programs (``.pt2``) and ONNX models."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

from exporter.digests import file_digest
from exporter.errors import RequestError
from exporter.onnx_tensors import check_tensors
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
    external = check_tensors(model, path)
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
        parameters=sum(math.prod(tensor.dims) for tensor in model.graph.initializer),
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


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise RequestError("there is no such file", path, "Check the path")
