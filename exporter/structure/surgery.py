"""Changing an encoder inside: removing heads, neurons and layers, and letting layers share their weights.

What is removed is gone from the weights: the exported graph is smaller. What cannot be said in the fields of a
configuration (other numbers of heads in each layer, shared layers) stands in it under `STRUCTURE`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from exporter.errors import RequestError
from exporter.structure.anatomy import LayerParts, anatomy_of, head_size, layer_parts, layers_of

if TYPE_CHECKING:
    import torch
    from torch import nn

STRUCTURE = "planish_structure"
"""Key of ``config.json``: ``{"heads": [per layer], "neurons": [per layer], "shares": [index of the first layer that
has the same weights, per layer]}``."""


def remove_heads(model: Any, layer: int, heads: Sequence[int]) -> None:
    """Remove attention heads of a layer, with their rows and columns in the projections.

    Args:
        model: A `transformers` encoder, changed in place.
        layer: Number of the layer.
        heads: Numbers of the heads, counted as the layer has them now.

    Raises:
        RequestError: There are no such heads, none would be left, or heads of this type of model cannot be removed.
    """
    anatomy, parts = anatomy_of(model), layer_parts(model, layer)
    gone = _checked(heads, parts.heads, f"heads of layer {layer}")
    if not gone:
        return
    if anatomy.why_no_heads:
        remedy = "Prune neurons or layers instead"
        raise RequestError(
            "heads of this model cannot be removed", f"{model.config.model_type}: {anatomy.why_no_heads}", remedy
        )
    kept = [head for head in range(parts.heads) if head not in gone]
    rows = [head * parts.head_size + i for head in kept for i in range(parts.head_size)]
    for part in (parts.query, parts.key, parts.value):
        _keep(part, rows, dim=0)
    _keep(parts.output, rows, dim=1)
    _count_heads(model, parts)
    note_structure(model)


def remove_neurons(model: Any, layer: int, neurons: Sequence[int]) -> None:
    """Remove neurons of a layer's feed-forward block, with their row in the first and their column in the second.

    Raises:
        RequestError: There are no such neurons, or none would be left.
    """
    parts = layer_parts(model, layer)
    gone = _checked(neurons, parts.neurons, f"neurons of layer {layer}")
    if not gone:
        return
    kept = [neuron for neuron in range(parts.neurons) if neuron not in gone]
    _keep(parts.up, kept, dim=0)
    _keep(parts.down, kept, dim=1)
    note_structure(model)


def keep_layers(model: Any, layers: Sequence[int]) -> None:
    """Keep these layers of a model, in this order.

    Raises:
        RequestError: There is no such layer, one is named twice, or none is.
    """
    from torch import nn

    anatomy, there = anatomy_of(model), layers_of(model)
    kept = sorted(set(layers))
    if kept != list(layers) or not kept or kept[0] < 0 or kept[-1] >= len(there):
        remedy = f"Name some of the layers 0 to {len(there) - 1}, from the lowest to the highest"
        raise RequestError("not layers to keep", list(layers), remedy)
    owner = _owner(model, anatomy.layers)
    name = anatomy.layers.rsplit(".", 1)[-1]
    setattr(owner, name, nn.ModuleList([there[number] for number in kept]))
    setattr(model.config, anatomy.config_layers, len(kept))
    for listed in ("layer_types",):  # a configuration may list something for each of its layers
        values = getattr(model.config, listed, None)
        if isinstance(values, list) and len(values) == len(there):
            setattr(model.config, listed, [values[number] for number in kept])
    note_structure(model)


def share_layers(model: Any, groups: Sequence[Sequence[int]]) -> None:
    """Let the layers of each group use the weights of the group's first: cross-layer parameter sharing as in ALBERT
    (Z. Lan et al., "ALBERT: A Lite BERT for Self-supervised Learning of Language Representations", 2020, section 3.1).

    Raises:
        RequestError: A layer does not exist or is in two groups, or layers of a group differ in their shapes.
    """
    layers = layers_of(model)
    named = [number for group in groups for number in group]
    if not all(groups) or len(set(named)) != len(named) or any(not 0 <= number < len(layers) for number in named):
        raise RequestError(
            "not groups of layers", [list(g) for g in groups], f"Layers 0 to {len(layers) - 1}, each at most once"
        )
    for group in groups:
        first = layers[group[0]]
        shapes = {name: tuple(p.shape) for name, p in first.named_parameters()}
        for number in group[1:]:
            if {name: tuple(p.shape) for name, p in layers[number].named_parameters()} != shapes:
                what = f"{group[0]} and {number}"
                raise RequestError(
                    "layers that differ in shape cannot share weights",
                    what,
                    "Share before pruning, or prune them alike",
                )
            layers[number] = first
    note_structure(model)


def shares_of(model: Any) -> list[int]:
    """For each layer the number of the first one that is the same module."""
    layers = list(layers_of(model))
    return [next(i for i, other in enumerate(layers) if other is layer) for layer in layers]


def structure_of(model: Any) -> dict[str, list[int]]:
    """Heads, neurons and sharing of each layer, as `STRUCTURE` has them.

    Raises:
        RequestError: As `anatomy_of`.
    """
    parts = [layer_parts(model, number) for number in range(len(layers_of(model)))]
    return {
        "heads": [part.heads for part in parts],
        "neurons": [part.neurons for part in parts],
        "shares": shares_of(model),
    }


def note_structure(model: Any) -> None:
    """Write into the configuration how the model is built: in its own fields where these can say it."""
    anatomy, found = anatomy_of(model), structure_of(model)
    if len(set(found["neurons"])) == 1:
        setattr(model.config, anatomy.config_neurons, found["neurons"][0])
    count = len(found["heads"])
    plain = {
        "heads": [int(getattr(model.config, anatomy.config_heads))] * count,
        "neurons": [int(getattr(model.config, anatomy.config_neurons))] * count,
        "shares": list(range(count)),
    }
    if found == plain:
        if hasattr(model.config, STRUCTURE):
            delattr(model.config, STRUCTURE)
    else:
        setattr(model.config, STRUCTURE, found)


def apply_structure(model: Any, structure: Mapping[str, Sequence[int]]) -> None:
    """Give a freshly made model the sizes and the sharing that a configuration notes; its weights mean nothing yet.

    Raises:
        RequestError: It does not fit the model.
    """
    anatomy, layers = anatomy_of(model), layers_of(model)
    wanted = {key: structure.get(key) for key in ("heads", "neurons", "shares")}
    # Removing only makes smaller: what the configuration's own fields say is the most.
    bounds = {
        "heads": (1, int(getattr(model.config, anatomy.config_heads))),
        "neurons": (1, int(getattr(model.config, anatomy.config_neurons))),
        "shares": (0, len(layers) - 1),
    }
    for key, values in wanted.items():
        sound = isinstance(values, list | tuple) and len(values) == len(layers) and all(type(v) is int for v in values)
        least, most = bounds[key]
        if not sound or any(not least <= value <= most for value in values or ()):
            remedy = f"It must give {key} of each of the {len(layers)} layers, {least} to {most}"
            raise _unfit(key, values, remedy)
    heads_given, neurons_given, shares = (list(wanted[key] or ()) for key in ("heads", "neurons", "shares"))
    for number, first in enumerate(shares):
        alike = (heads_given[first], neurons_given[first]) == (heads_given[number], neurons_given[number])
        if first > number or not alike:
            raise _unfit("shares", shares, f"Layer {number} must share with one before it that is as large")
    if anatomy.why_no_heads and any(heads != bounds["heads"][1] for heads in heads_given):
        raise _unfit("heads", heads_given, f"They cannot be removed: {anatomy.why_no_heads}")
    size = head_size(model)
    for number, (heads, neurons) in enumerate(zip(heads_given, neurons_given, strict=True)):
        parts = layer_parts(model, number)
        for part in (parts.query, parts.key, parts.value):
            _resize(part, rows=heads * size)
        _resize(parts.output, columns=heads * size)
        _resize(parts.up, rows=neurons)
        _resize(parts.down, columns=neurons)
        _count_heads(model, parts)
    for number, first in enumerate(shares):
        layers[number] = layers[first]
    note_structure(model)


def _unfit(key: str, values: Any, remedy: str) -> RequestError:
    return RequestError(f"config.json: {STRUCTURE} does not fit the model", f"{key}: {values!r}"[:200], remedy)


def _checked(numbers: Sequence[int], count: int, what: str) -> set[int]:
    wanted = set(numbers)
    if wrong := sorted(number for number in wanted if not 0 <= number < count):
        raise RequestError(f"the model has no such {what}", wrong, f"There are {count}, counted from 0")
    if len(wanted) >= count:
        raise RequestError(f"no {what} would be left", f"all {count} of them", "Leave at least one")
    return wanted


def _owner(model: Any, path: str) -> Any:
    base = getattr(model, model.base_model_prefix, model) if model.base_model_prefix else model
    for name in path.split(".")[:-1]:
        base = getattr(base, name)
    return base


def _keep(linear: nn.Linear, kept: Sequence[int], dim: int) -> None:
    import torch
    from torch import nn

    index = torch.tensor(kept, device=linear.weight.device)
    trains = linear.weight.requires_grad
    linear.weight = nn.Parameter(linear.weight.detach().index_select(dim, index).clone(), requires_grad=trains)
    if dim == 0 and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[index].clone(), requires_grad=trains)
    _measure(linear)


def _resize(linear: nn.Linear, rows: int | None = None, columns: int | None = None) -> None:
    from torch import nn

    shape = (rows or linear.weight.shape[0], columns or linear.weight.shape[1])
    if tuple(linear.weight.shape) != shape:
        linear.weight = nn.Parameter(_zeros(linear.weight, shape))
    if linear.bias is not None and linear.bias.shape[0] != shape[0]:
        linear.bias = nn.Parameter(_zeros(linear.bias, shape[:1]))
    _measure(linear)


def _zeros(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return like.new_zeros(shape)


def _measure(linear: nn.Linear) -> None:
    linear.out_features, linear.in_features = linear.weight.shape


def _count_heads(model: Any, parts: LayerParts) -> None:
    anatomy = anatomy_of(model)
    heads = parts.query.out_features // parts.head_size
    for name, value in ((anatomy.head_count, heads), (anatomy.head_width, parts.query.out_features)):
        if name and hasattr(parts.attention, name):
            setattr(parts.attention, name, value)
