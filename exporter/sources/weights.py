"""Weight files: which ones a model folder has, and whether they are whole."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import RequestError

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"

_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
_DOWNLOAD_AGAIN = "Copy or download the file again"
# A safetensors file begins with the length of its JSON header; the format allows at most this many bytes.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Weights:
    """The weight files of a folder, relative to it, the bytes they hold and the number of elements where known."""

    files: tuple[str, ...]
    bytes: int
    parameters: int | None
    index: str | None = None
    pickled: bool = False


def find_weights(folder: Path) -> Weights:
    """The weights of a model folder, checked: safetensors, or else a pickle checkpoint that holds only tensors.

    Raises:
        RequestError: The folder has no weights, a file is missing, truncated or corrupt, or a checkpoint holds more
            than tensors.
    """
    if (folder / SAFETENSORS).is_file():
        return _safetensors(folder, (SAFETENSORS,), None)
    if (folder / SAFETENSORS_INDEX).is_file():
        return _safetensors(folder, read_index(folder, SAFETENSORS_INDEX), SAFETENSORS_INDEX)
    if (folder / PICKLE).is_file():
        return _pickles(folder, (PICKLE,), None)
    if (folder / PICKLE_INDEX).is_file():
        return _pickles(folder, read_index(folder, PICKLE_INDEX), PICKLE_INDEX)
    if (folder / "onnx" / "model.onnx").is_file():
        raise RequestError("the folder holds no weights", folder, "It holds onnx/model.onnx: name that file instead")
    others = sorted(path.name for path in folder.iterdir() if path.suffix in _OTHER_WEIGHTS)
    found = f", found {', '.join(others)}" if others else ""
    raise RequestError(
        "the folder holds no weights", folder, f"Expected {SAFETENSORS} (or its shards and {SAFETENSORS_INDEX}){found}"
    )


def read_index(folder: Path, name: str) -> tuple[str, ...]:
    """The shard files that an index names.

    Raises:
        RequestError: The index is broken, a shard is missing or lies outside the folder.
    """
    try:
        mapping = json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"]
        shards = tuple(sorted({str(shard) for shard in mapping.values()}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"the weight index is broken ({error})", folder / name, _DOWNLOAD_AGAIN) from error
    for shard in shards:
        if not (folder / shard).resolve().is_relative_to(folder.resolve()) and not (folder / shard).is_symlink():
            raise RequestError(f"the weight index {name} names a file outside the folder", shard)
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise RequestError(
            f"{len(missing)} of the {len(shards)} weight files that {name} names are missing",
            ", ".join(missing),
            f"Put them into {folder}",
        )
    if not shards:
        raise RequestError("the weight index names no file", folder / name, _DOWNLOAD_AGAIN)
    return shards


def read_safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """The tensors that a safetensors file declares: name to ``{"dtype", "shape", "data_offsets"}``.

    The format: 8 bytes little-endian header length, a JSON header, then the data, which must fill the rest exactly
    (https://github.com/huggingface/safetensors#format).

    Raises:
        RequestError: The file is truncated or its header is not what the format demands.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise RequestError(
                "a safetensors file is truncated or corrupt",
                path,
                f"It has {size} bytes but its header alone claims {length}. {_DOWNLOAD_AGAIN}",
            )
        if length > _MAX_HEADER_BYTES:
            raise RequestError("a safetensors file is corrupt: its header is too long", path, _DOWNLOAD_AGAIN)
        text = file.read(length)
    try:
        header = json.loads(text)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        spans = sorted((int(e["data_offsets"][0]), int(e["data_offsets"][1])) for e in tensors.values())
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise RequestError("a safetensors file is corrupt: its header does not parse", path, _DOWNLOAD_AGAIN) from error
    end = 0
    for start, stop in spans:
        if start != end or stop < start:
            raise RequestError(
                "a safetensors file is corrupt: its tensors overlap or leave gaps", path, _DOWNLOAD_AGAIN
            )
        end = stop
    if end != size - 8 - length:
        raise RequestError(
            "a safetensors file is truncated or corrupt",
            path,
            f"Its header promises {end} bytes of weights, it holds {size - 8 - length}. {_DOWNLOAD_AGAIN}",
        )
    return tensors


_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}
"""By their names in safetensors files, how NumPy calls element types."""


def stored_dtypes(folder: Path | None, files: Iterable[str]) -> dict[str, int]:
    """Elements per element type, as safetensors files declare them, most first; empty for other weights."""
    counts: Counter[str] = Counter()
    for name in files:
        if folder is not None and name.endswith(".safetensors"):
            for tensor in read_safetensors_header(folder / name).values():
                dtype = str(tensor["dtype"])
                counts[_DTYPES.get(dtype, dtype.lower())] += math.prod(tensor["shape"])
    return dict(counts.most_common())


def _safetensors(folder: Path, files: tuple[str, ...], index: str | None) -> Weights:
    headers = {name: read_safetensors_header(folder / name) for name in files}
    if index is not None:
        mapping = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
        if lost := [tensor for tensor, shard in mapping.items() if tensor not in headers[shard]]:
            raise RequestError(
                f"{len(lost)} tensors that {index} names are not in its files", ", ".join(lost[:3]), _DOWNLOAD_AGAIN
            )
    tensors = [entry for header in headers.values() for entry in header.values()]
    if not tensors:
        raise RequestError("the weight file holds no tensors", folder / files[0], _DOWNLOAD_AGAIN)
    parameters = sum(math.prod(entry.get("shape", ())) for entry in tensors)
    return Weights(files, sum((folder / name).stat().st_size for name in files), parameters, index)


def _pickles(folder: Path, files: tuple[str, ...], index: str | None) -> Weights:
    parameters = sum(_pickle_elements(folder / name) for name in files)
    return Weights(files, sum((folder / name).stat().st_size for name in files), parameters, index, pickled=True)


def _pickle_elements(path: Path) -> int:
    """Elements in a checkpoint; refuses one that holds anything but tensors and plain containers."""
    import pickle

    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        others = sorted({*_unsafe_globals(path), *_named_globals(str(error))})
        if others:
            raise RequestError(
                f"the pickle checkpoint {path.name} holds more than tensors",
                ", ".join(others),
                "Opening it would run code. Ask its author for safetensors, or convert it where you trust it",
            ) from error
        raise RequestError("the pickle checkpoint is truncated or corrupt", path, _DOWNLOAD_AGAIN) from error
    if not isinstance(state, dict) or not any(isinstance(value, torch.Tensor) for value in state.values()):
        raise RequestError(
            "the pickle checkpoint holds no table of tensors", path, f"It holds a {type(state).__name__}"
        )
    return sum(value.numel() for value in state.values() if isinstance(value, torch.Tensor))


def _unsafe_globals(path: Path) -> list[str]:
    """What a checkpoint would import, read from its pickle without running it."""
    import pickletools
    import zipfile

    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                entry = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                data = archive.read(entry)
        else:
            data = path.read_bytes()
        return sorted(name for name in _globals(pickletools.genops(data)) if not _is_tensor_part(name))
    except (ValueError, StopIteration, OSError, KeyError, zipfile.BadZipFile):
        return []


def _named_globals(message: str) -> set[str]:
    """What torch's own refusal names."""
    import re

    return set(re.findall(r"GLOBAL ([A-Za-z_][\w.]*\w)", message))


def _globals(operations: Any) -> set[str]:
    found: set[str] = set()
    strings: list[str] = []
    for operation, argument, _ in operations:
        if operation.name == "GLOBAL":
            found.add(str(argument).replace(" ", "."))
        elif operation.name == "STACK_GLOBAL" and len(strings) >= 2:
            found.add(".".join(strings[-2:]))
        if isinstance(argument, str) and "UNICODE" in operation.name:
            strings.append(argument)
    return found


def _is_tensor_part(name: str) -> bool:
    """Whether a checkpoint's import is one that plain tensors need."""
    return (
        name == "collections.OrderedDict"
        or name.startswith(("torch._utils.", "torch.storage.", "torch._tensor."))
        or (name.startswith("torch.") and name.endswith("Storage"))
    )
