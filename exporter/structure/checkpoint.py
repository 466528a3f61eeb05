"""Writing a changed model as a Hugging Face folder, each shared tensor once, and filling a model from one."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.errors import RequestError

if TYPE_CHECKING:
    import torch

    from exporter.sources import Source

WEIGHTS = "model.safetensors"
_CODES, _BOOK = ".planish_codes", ".planish_book"
"""Endings of the two tensors that stand for a clustered weight: which of the values each element is, and the values."""
MOST_VALUES = 256
_HEAD = "sentence_head."
"""Pooling and dense layers that an opened original carries: their weights are in files of their own, beside these."""


def save_checkpoint(
    model: Any, folder: Path, *, small_files: Iterable[tuple[str, Path]] = (), clustered: Iterable[str] = ()
) -> None:
    """Write a `transformers` model: ``config.json`` and ``model.safetensors``.

    Tensors that share their memory are written once, under the first of their names. `load_state` puts them back.
    `transformers` by itself refuses a folder whose layers share weights, or whose weights are clustered.

    Args:
        model: The model, on any device.
        folder: Where to; it is made.
        small_files: Further files by their name in the folder: tokenizer, pooling, licence.
        clustered: Names of weights that have few values (`MOST_VALUES` at most, told apart by their bits): they are
            stored as a table of these and a byte per element. Only Planish reads such a folder.

    Raises:
        RequestError: The model has no such weight to cluster, or one has too many values.
    """
    from safetensors.torch import save_file

    from exporter.structure.surgery import STRUCTURE, structure_of

    state = stored_once(model)
    names = list(dict.fromkeys(clustered))
    if unknown := [name for name in names if name not in state]:
        remedy = "Weights that share their memory go by the first of their names"
        raise RequestError("the model has no such weight to cluster", ", ".join(unknown[:5]), remedy)
    for name in names:
        state |= _clustered(name, state.pop(name))
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in small_files:
        if name != "config.json":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
    model.config.architectures = [_class_name(model)]
    model.config.dtype = "float32"
    plain = copy.deepcopy(model.config)
    if names and not hasattr(plain, STRUCTURE):  # it says who has to read the weights
        setattr(plain, STRUCTURE, structure_of(model))
    save_file(state | _marks(model, state, names), folder / WEIGHTS, metadata={"format": "pt"})
    plain.save_pretrained(folder)
    shutil.copymode(folder / "config.json", folder / WEIGHTS)  # its writer leaves it to the owner alone


def _marks(model: Any, state: Mapping[str, Any], clustered: Sequence[str]) -> dict[str, torch.Tensor]:
    """Empty tensors under the names that `transformers` would look for: of clustered weights, and in shared layers.

    What it does not find it makes up; at a weight of another shape it stops.
    """
    import torch

    from exporter.structure.anatomy import layers_of

    names = list(clustered)
    try:
        layers = list(layers_of(model))
    except RequestError:  # nothing of it can be shared
        layers = []
    if len({id(layer) for layer in layers}) < len(layers):
        for prefix, module in model.named_modules(remove_duplicate=False):
            if any(module is layer for layer in layers):
                inside = (f"{prefix}.{name}" for name in module.state_dict())
                names += [name for name in inside if name not in state and name + _CODES not in state]
    return {name: torch.empty(0) for name in names}


def files_beside(source: Source) -> list[tuple[str, Path]]:
    """What belongs to a model folder beside the encoder's weights, by name: small files, and weights of pooling."""
    folder = source.path
    if folder is None or not source.is_folder:
        raise RequestError("the source is no model folder", source.spec)
    names = [*source.files, *(name for name in source.weights if "/" in name)]
    return [(name, folder / name) for name in names]


def stored_once(model: Any) -> dict[str, torch.Tensor]:
    """The model's state on the CPU, of tensors that are the same memory only the first name."""
    seen: set[tuple[int, ...]] = set()
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(_HEAD):
            continue
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
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(_HEAD)}
    state = {
        name: tensor for name, tensor in state.items() if tensor.numel() or name not in own or not own[name].numel()
    }
    # Of names that share their memory any one will do.
    given = {own[name].data_ptr() for name in state if name in own}
    missing = [name for name, tensor in own.items() if name not in state and tensor.data_ptr() not in given]
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


_INTEGERS = {2: "int16", 4: "int32"}
"""By bytes per element."""


def _clustered(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    import torch

    if (bits := _INTEGERS.get(tensor.element_size())) is None or not tensor.is_floating_point():
        raise RequestError("a weight of this type is not clustered", f"{name}: {tensor.dtype}", "Cluster FP32 or half")
    # By bits: as numbers the two zeros are one.
    book, codes = torch.unique(tensor.view(getattr(torch, bits)), return_inverse=True)
    book = book.view(tensor.dtype)
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
