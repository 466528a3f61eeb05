"""Writing a changed model as a Hugging Face folder, each shared tensor once, and filling a model from one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.errors import RequestError

if TYPE_CHECKING:
    import torch

WEIGHTS = "model.safetensors"
_CODES, _BOOK = ".planish_codes", ".planish_book"
"""Endings of the two tensors that stand for a clustered weight: which of the values each element is, and the values."""
MOST_VALUES = 256


def save_checkpoint(
    model: Any, folder: Path, *, small_files: Iterable[tuple[str, Path]] = (), clustered: Iterable[str] = ()
) -> None:
    """Write a `transformers` model: ``config.json`` and ``model.safetensors``.

    Tensors that share their memory are written once, under the first of their names. `load_state` puts them back.

    Args:
        model: The model, on any device.
        folder: Where to; it is made.
        small_files: Further files by their name in the folder: tokenizer, pooling, licence.
        clustered: Names of weights that have few values (`MOST_VALUES` at most): they are stored as a table of these
            and a byte per element.
    """
    from safetensors.torch import save_file

    from exporter.structure.surgery import STRUCTURE, structure_of

    clustered = list(clustered)
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in small_files:
        if name != "config.json":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
    state = stored_once(model)
    for name in clustered:
        state |= _clustered(name, state.pop(name))
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    model.config.architectures = [_class_name(model)]
    model.config.dtype = "float32"
    # Clusters are read by what reads a structure, so there is one.
    noted = bool(clustered) and not hasattr(model.config, STRUCTURE)
    if noted:
        setattr(model.config, STRUCTURE, structure_of(model))
    model.config.save_pretrained(folder)
    if noted:
        delattr(model.config, STRUCTURE)


def stored_once(model: Any) -> dict[str, torch.Tensor]:
    """The model's state on the CPU, of tensors that are the same memory only the first name."""
    seen: set[tuple[int, ...]] = set()
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), *tensor.shape, *tensor.stride()) if tensor.numel() else (id(tensor),)
        if place not in seen:
            seen.add(place)
            state[name] = tensor.detach().cpu().contiguous().clone()
    return state


def read_state(folder: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The tensors in a folder's weight files, clustered ones as they were."""
    from safetensors.torch import load_file

    state: dict[str, torch.Tensor] = {}
    for name in names:
        state |= load_file(folder / name)
    for name in [name for name in state if name.endswith(_CODES)]:
        base = name.removesuffix(_CODES)
        codes, book = state.pop(name), state.pop(base + _BOOK)
        state[base] = book[codes.long()]
    return state


def load_state(model: Any, state: dict[str, torch.Tensor], where: object) -> None:
    """Fill a model that has its structure already (`apply_structure`).

    Raises:
        RequestError: A tensor is missing, has another shape, or is not the model's.
    """
    own = model.state_dict()
    places: dict[int, str] = {}
    missing = []
    for name, tensor in own.items():
        first = places.setdefault(tensor.data_ptr(), name) if tensor.numel() else name
        if name not in state and first not in state:
            missing.append(name)
    strange = [name for name in state if name not in own]
    unlike = [name for name in state if name in own and own[name].shape != state[name].shape]
    if wrong := [*missing, *strange, *unlike]:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise RequestError(
            f"the weights do not fit what config.json says ({len(missing)} missing, {len(strange)} unknown, "
            f"{len(unlike)} of another shape)",
            ", ".join(wrong[:5]) + more,
            f"Look at {where}",
        )
    model.load_state_dict(state, strict=False)


def _clustered(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    import torch

    book, codes = torch.unique(tensor, return_inverse=True)
    if len(book) > MOST_VALUES:
        raise RequestError("a clustered weight has too many values", f"{name}: {len(book)}", f"{MOST_VALUES} at most")
    return {name + _CODES: codes.to(torch.uint8), name + _BOOK: book}


def _class_name(model: Any) -> str:
    """Of the `transformers` class: an opened original is of a subclass of it."""
    for kind in type(model).__mro__:
        if kind.__module__.startswith("transformers.") or not kind.__module__.startswith("exporter."):
            return str(kind.__name__)
    return type(model).__name__


def read_structure(folder: Path) -> dict[str, Any] | None:
    """What ``config.json`` says of a structure that its own fields cannot say, or ``None``."""
    from exporter.structure.surgery import STRUCTURE

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = config.get(STRUCTURE)
    return found if isinstance(found, dict) else None
