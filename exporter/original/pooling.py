"""What sentence-transformers puts behind the encoder: pooling, dense layers, normalization, as one module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exporter.errors import RequestError
from exporter.sources.folder import MODULE_WEIGHTS, module_folder
from exporter.sources.source import Source

# Keys of older configurations, in the order in which the library concatenates several poolings.
_LEGACY_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def _accumulation(hidden: Tensor) -> torch.dtype:
    return torch.float32 if hidden.dtype in (torch.float16, torch.bfloat16) else hidden.dtype


def _take(hidden: Tensor, positions: Tensor) -> Tensor:
    index = positions.reshape(-1, 1, 1).expand(-1, 1, hidden.shape[-1])
    return hidden.gather(1, index).squeeze(1)


def _first(mask: Tensor) -> Tensor:
    return mask.to(torch.int32).argmax(dim=1)


def pool_cls(hidden: Tensor, mask: Tensor) -> Tensor:
    """The first token attended to (not position 0: texts may be padded on the left)."""
    return _take(hidden, _first(mask))


def pool_last(hidden: Tensor, mask: Tensor) -> Tensor:
    """The last token attended to; zeros for a row without one."""
    positions = torch.arange(mask.shape[1], device=mask.device, dtype=torch.int32)
    last = (mask.to(torch.int32) * positions).argmax(dim=1)
    return _take(hidden * mask.unsqueeze(-1).to(hidden.dtype), last)


def pool_max(hidden: Tensor, mask: Tensor) -> Tensor:
    """The largest value over the tokens attended to."""
    return hidden.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).amax(dim=1)


def pool_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean over the tokens attended to; zeros for a row without one."""
    weights = mask.unsqueeze(-1).to(_accumulation(hidden))
    return ((hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)).to(hidden.dtype)


def pool_mean_sqrt(hidden: Tensor, mask: Tensor) -> Tensor:
    """The sum over the tokens attended to, divided by the root of their number."""
    weights = mask.unsqueeze(-1).to(_accumulation(hidden))
    return ((hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9).sqrt()).to(hidden.dtype)


def pool_weighted_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean over the tokens attended to, each weighted by its place (1, 2, …) after the first of them."""
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device).unsqueeze(0) - _first(mask).unsqueeze(1)
    weights = (mask * places).unsqueeze(-1).to(_accumulation(hidden))
    return ((hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)).to(hidden.dtype)


POOLINGS = {
    "cls": pool_cls,
    "max": pool_max,
    "mean": pool_mean,
    "mean_sqrt_len_tokens": pool_mean_sqrt,
    "weightedmean": pool_weighted_mean,
    "lasttoken": pool_last,
}


class Pooling(nn.Module):
    """From (batch, sequence, hidden) and a mask (batch, sequence) to (batch, hidden x number of modes)."""

    def __init__(self, modes: tuple[str, ...]) -> None:
        super().__init__()
        self.modes = modes

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return torch.cat([POOLINGS[mode](hidden, mask) for mode in self.modes], dim=-1)


class Dense(nn.Module):
    """A linear layer and its activation."""

    def __init__(self, linear: nn.Linear, activation: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.activation = activation

    def forward(self, vector: Tensor) -> Tensor:
        return self.activation(self.linear(vector))


class Normalize(nn.Module):
    """Vectors of length 1."""

    def forward(self, vector: Tensor) -> Tensor:
        return nn.functional.normalize(vector, p=2.0, dim=-1)


class SentenceHead(nn.Module):
    """Everything behind the encoder, in order."""

    def __init__(self, pooling: Pooling, rest: list[nn.Module]) -> None:
        super().__init__()
        self.pooling = pooling
        self.rest = nn.ModuleList(rest)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        vector = self.pooling(hidden, mask)
        for module in self.rest:
            vector = module(vector)
        return vector


def load_sentence_head(source: Source) -> SentenceHead | None:
    """The head that a folder's ``modules.json`` describes, or ``None`` where there is no such file.

    Raises:
        RequestError: The file is not what sentence-transformers writes, or names a module that is not supported.
    """
    modules = source.json("modules.json")
    if modules is None or source.path is None:
        return None
    if not isinstance(modules, list) or not all(isinstance(m, dict) and "type" in m for m in modules):
        raise RequestError("modules.json is not what sentence-transformers writes", source.path / "modules.json")
    steps = [
        (str(module["type"]).rsplit(".", 1)[-1], module_folder(source.path, str(module.get("path") or "")))
        for module in modules
    ]
    names = [name for name, _ in steps]
    if names[:1] != ["Transformer"]:
        raise RequestError("modules.json must begin with a Transformer", ", ".join(names))
    if unknown := [name for name in names[1:] if name not in _BUILDERS and name != "Pooling"]:
        supported = ", ".join(["Transformer", "Pooling", *_BUILDERS])
        raise RequestError("modules.json names a module that is not supported", unknown[0], f"Supported: {supported}")
    if names.count("Pooling") != 1 or names[1] != "Pooling":
        raise RequestError("modules.json must have one Pooling, right after the Transformer", ", ".join(names))
    rest = [_BUILDERS[name](folder) for name, folder in steps[2:]]
    return SentenceHead(_build_pooling(steps[1][1], source), [module for module in rest if module is not None])


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise RequestError("a module that modules.json names has no config.json", path)
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise RequestError("a module's config.json must hold a JSON object", path)
    return config


def _build_pooling(folder: Path, source: Source) -> Pooling:
    config = _config(folder)
    modes = config.get("pooling_mode") or tuple(mode for key, mode in _LEGACY_MODES.items() if config.get(key))
    modes = (modes,) if isinstance(modes, str) else tuple(modes) or ("mean",)
    if unknown := [mode for mode in modes if mode not in POOLINGS]:
        raise RequestError("the pooling is not known", unknown[0], f"Known: {', '.join(POOLINGS)}")
    prompts = source.json("config_sentence_transformers.json") or {}
    if config.get("include_prompt") is False and prompts.get("default_prompt_name"):
        raise RequestError(
            "a pooling that leaves out the default prompt is not supported", folder / "config.json", "Drop the prompt"
        )
    return Pooling(modes)


def _build_dense(folder: Path) -> nn.Module:
    config = _config(folder)
    if config.get("use_residual"):
        raise RequestError("a dense layer with a residual is not supported", folder / "config.json")
    activation_name = str(config.get("activation_function", "torch.nn.modules.linear.Identity")).rsplit(".", 1)[-1]
    activation = getattr(nn, activation_name, None)
    if not (isinstance(activation, type) and issubclass(activation, nn.Module)):
        raise RequestError("the dense layer's activation is not known", activation_name)
    linear = nn.Linear(int(config["in_features"]), int(config["out_features"]), bias=bool(config.get("bias", True)))
    state = _module_state(folder)
    linear.load_state_dict({key.removeprefix("linear."): value.float() for key, value in state.items()})
    return Dense(linear, activation())


def _build_layer_norm(folder: Path) -> nn.Module:
    norm = nn.LayerNorm(int(_config(folder)["dimension"]))
    norm.load_state_dict({key.removeprefix("norm."): value.float() for key, value in _module_state(folder).items()})
    return norm


def _module_state(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    path = next((folder / name for name in MODULE_WEIGHTS if (folder / name).is_file()), None)
    if path is not None and path.suffix == ".safetensors":
        return load_file(path)
    if path is not None:
        return torch.load(path, map_location="cpu", weights_only=True)
    raise RequestError("a module that modules.json names has no weights", folder, "Expected model.safetensors")


_BUILDERS: dict[str, Any] = {
    "Dense": _build_dense,
    "LayerNorm": _build_layer_norm,
    "Normalize": lambda _folder: Normalize(),
    "Dropout": lambda _folder: None,
}
