"""Parts of an encoder that change no output, found in its weights and removed; layers that are identical."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from exporter.structure import anatomy_of, layer_parts, remove_heads, remove_neurons
from exporter.structure.surgery import shares_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from exporter.structure import LayerParts

_ACTIVATIONS = ("hidden_act", "activation", "hidden_activation", "activation_function")
"""Under these names configurations have the activation between the two linear layers of a feed-forward block."""


@dataclass(frozen=True)
class DeadParts:
    """What does nothing in one layer.

    Attributes:
        layer: Its number.
        heads: Of the layer.
        neurons: Of its feed-forward block.
        dead_heads: Numbers of the heads that contribute nothing.
        dead_neurons: Numbers of the neurons that contribute nothing.
        removable_heads: Those of them that can go: a layer keeps at least one head.
        removable_neurons: Those of them that can go: a layer keeps at least one neuron.
        why_no_heads: Why heads cannot be removed; empty where they can.
    """

    layer: int
    heads: int
    neurons: int
    dead_heads: tuple[int, ...]
    dead_neurons: tuple[int, ...]
    removable_heads: tuple[int, ...]
    removable_neurons: tuple[int, ...]
    why_no_heads: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def dead_parts(model: Any) -> list[DeadParts]:
    """Heads and neurons that change no output, by layer; of layers that share their weights the first.

    A head is dead when its columns of the output projection are zero, or the rows and the bias of its values: then its
    result is zero whatever it attends to. A neuron is dead when its column of the second linear layer is zero, or its
    row of the first is and the activation of its bias is zero.

    Raises:
        RequestError: The inside of this type of model is not known.
    """
    anatomy = anatomy_of(model)
    found = []
    for number, first in enumerate(shares_of(model)):
        if first != number:
            continue
        parts = layer_parts(model, number)
        heads, neurons = _dead_heads(parts), _dead_neurons(parts, _activation(model.config))
        found.append(
            DeadParts(
                layer=number,
                heads=parts.heads,
                neurons=parts.neurons,
                dead_heads=heads,
                dead_neurons=neurons,
                removable_heads=() if anatomy.why_no_heads else _leave_one(heads, parts.heads),
                removable_neurons=_leave_one(neurons, parts.neurons),
                why_no_heads=anatomy.why_no_heads,
            )
        )
    return found


def remove_dead(model: Any, found: Sequence[DeadParts]) -> None:
    """Remove what can go, in place."""
    for parts in found:
        remove_heads(model, parts.layer, parts.removable_heads)
        remove_neurons(model, parts.layer, parts.removable_neurons)


def identical_layers(module: nn.Module) -> list[dict[str, Any]]:
    """Layers of one list whose parameters are bitwise equal.

    Returns:
        For each group ``list`` (name of the list), ``layers`` (numbers), ``stored_once`` (they are the same tensors),
        ``parameters`` (those that are stored more often than needed).
    """
    from torch import nn

    groups = []
    for name, part in module.named_modules():
        if not isinstance(part, nn.ModuleList) or len(part) < 2:
            continue
        alike: dict[str, list[int]] = {}
        for number, layer in enumerate(part):
            if any(parameter.dim() > 1 for parameter in layer.parameters()):
                alike.setdefault(_digest(layer), []).append(number)
        for numbers in alike.values():
            if len(numbers) < 2:
                continue
            places = {_places(part[number]) for number in numbers}
            size = sum(parameter.numel() for parameter in part[numbers[0]].parameters())
            found = {"list": name, "layers": numbers, "stored_once": len(places) == 1}
            groups.append({**found, "parameters": (len(places) - 1) * size})
    return groups


def _digest(layer: nn.Module) -> str:
    digest = hashlib.sha256(type(layer).__qualname__.encode())
    for name, tensor in sorted(layer.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _places(layer: nn.Module) -> tuple[int, ...]:
    return tuple(parameter.data_ptr() for parameter in layer.parameters())


def _dead_heads(parts: LayerParts) -> tuple[int, ...]:
    size, heads = parts.head_size, parts.heads
    unread = (parts.output.weight.detach() == 0).all(dim=0).reshape(heads, size).all(dim=1)
    silent = (parts.value.weight.detach() == 0).all(dim=1)
    if parts.value.bias is not None:
        silent &= parts.value.bias.detach() == 0
    return _numbers(unread | silent.reshape(heads, size).all(dim=1))


def _dead_neurons(parts: LayerParts, activation: Any) -> tuple[int, ...]:
    import torch

    dead = (parts.down.weight.detach() == 0).all(dim=0)
    if activation is not None:
        bias = torch.zeros(parts.neurons) if parts.up.bias is None else parts.up.bias.detach()
        dead |= (parts.up.weight.detach() == 0).all(dim=1) & (activation(bias) == 0)
    return _numbers(dead)


def _activation(config: Any) -> Any:
    """The feed-forward block's activation, or ``None`` where the configuration does not name it."""
    from transformers.activations import ACT2FN

    name = next((value for key in _ACTIVATIONS if isinstance(value := getattr(config, key, None), str)), None)
    if name is None or name not in ACT2FN:
        return None
    return ACT2FN[name]  # which makes it: `get` would return its class


def _numbers(flags: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(number) for number in flags.nonzero().flatten())


def _leave_one(dead: tuple[int, ...], count: int) -> tuple[int, ...]:
    return dead[1:] if len(dead) == count else dead
