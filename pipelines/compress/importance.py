"""How much heads, neurons and layers matter: first-order estimates of what the loss would change without them.

Of an output ``x`` that is multiplied away, the loss changes by about ``x · ∂L/∂x`` (P. Molchanov et al., "Pruning
Convolutional Neural Networks for Resource Efficient Inference", 2017, equation 7; for heads P. Michel, O. Levy and
G. Neubig, "Are Sixteen Heads Really Better than One?", 2019, equation 2). Summed over a row's tokens, taken absolutely,
and averaged over rows; scaled to a norm of one in each layer, as both found better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exporter.structure import layer_parts, layers_of, shares_of


@dataclass(frozen=True)
class Importance:
    """Figures without a unit; only their order within a kind means something.

    Attributes:
        heads: By layer, float64 (heads,); layers that share their weights have the same ones.
        neurons: By layer, float64 (neurons,).
        layers: float64 (layers,).
        rows: Rows that they were measured on.
    """

    heads: list[Tensor]
    neurons: list[Tensor]
    layers: Tensor
    rows: int


def measure_importance(model: Any, batches: Iterable[Any], loss_of: Callable[[Any, Any], Tensor]) -> Importance:
    """Importance of a model's parts over some batches.

    Args:
        model: In evaluation mode; its gradients are left empty.
        batches: What `loss_of` takes.
        loss_of: From model and batch to the summed loss.
    """
    all_layers = list(layers_of(model))
    count = len(all_layers)
    parts = [layer_parts(model, number) for number in range(count)]
    firsts = shares_of(model)
    heads = [torch.zeros(part.heads, dtype=torch.float64) for part in parts]
    neurons = [torch.zeros(part.neurons, dtype=torch.float64) for part in parts]
    layers = torch.zeros(count, dtype=torch.float64)
    seen: dict[tuple[str, int], list[Tensor]] = {}
    handles = []
    # A layer that several places share runs once for each of them, in their order.
    places = {first: [i for i, other in enumerate(firsts) if other == first] for first in firsts}
    for first in places:
        handles.append(parts[first].output.register_forward_pre_hook(_keep(seen, "heads", first)))
        handles.append(parts[first].down.register_forward_pre_hook(_keep(seen, "neurons", first)))
        handles.append(all_layers[first].register_forward_hook(_keep_both(seen, first)))
    rows = 0
    try:
        for batch in batches:
            seen.clear()
            model.zero_grad(set_to_none=True)
            loss = loss_of(model, batch)
            loss.backward()
            for first, group in places.items():
                # What its parts add in all its places goes with them.
                change = sum(_changes(given) for given in seen["heads", first])
                heads[first] += change.view(len(change), -1, parts[first].head_size).sum(dim=-1).abs().sum(dim=0)
                neurons[first] += sum(_changes(given) for given in seen["neurons", first]).abs().sum(dim=0)
                for number, given, made in zip(group, seen["in", first], seen["out", first], strict=True):
                    if made.grad is not None:
                        added = (made.detach() - given.detach()).double() * made.grad.double()
                        layers[number] += added.flatten(1).sum(dim=1).abs().sum()
            rows += len(seen["heads", 0][0])
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
    unit = [[_unit(kind[first]) for first in firsts] for kind in (heads, neurons)]
    return Importance(unit[0], unit[1], layers / max(1, rows), rows)


def _changes(given: Tensor) -> Tensor:
    """``x · ∂L/∂x`` of a part's input, summed over tokens: float64 (rows, width)."""
    if given.grad is None:
        return torch.zeros(given.shape[0], given.shape[-1], dtype=torch.float64)
    change = given.detach().double() * given.grad.double()
    return change.flatten(1, -2).sum(dim=1)


def _unit(values: Tensor) -> Tensor:
    norm = values.norm()
    return values / norm if norm > 0 else values


def _keep(seen: dict[tuple[str, int], list[Tensor]], name: str, number: int) -> Callable[..., None]:
    def hook(module: Any, given: tuple[Tensor, ...]) -> None:
        if given[0].requires_grad:
            given[0].retain_grad()
        seen.setdefault((name, number), []).append(given[0])

    return hook


def _keep_both(seen: dict[tuple[str, int], list[Tensor]], number: int) -> Callable[..., None]:
    def hook(module: Any, given: tuple[Tensor, ...], output: Any) -> None:
        made = output[0] if isinstance(output, tuple) else output
        if made.requires_grad:
            made.retain_grad()
        seen.setdefault(("in", number), []).append(given[0])
        seen.setdefault(("out", number), []).append(made)

    return hook
