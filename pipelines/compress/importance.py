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

from exporter.structure import layer_parts, layers_of


@dataclass(frozen=True)
class Importance:
    """Figures without a unit; only their order within a kind means something.

    Attributes:
        heads: By layer, float64 (heads,).
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
    count = len(layers_of(model))
    parts = [layer_parts(model, number) for number in range(count)]
    sizes = [(part.heads, part.neurons) for part in parts]
    heads = [torch.zeros(n, dtype=torch.float64) for n, _ in sizes]
    neurons = [torch.zeros(n, dtype=torch.float64) for _, n in sizes]
    layers = torch.zeros(count, dtype=torch.float64)
    seen: dict[tuple[str, int], Tensor] = {}
    handles = []
    # A layer that several share is run several times: what it is given each time is told apart by the order.
    for number, (part, layer) in enumerate(zip(parts, layers_of(model), strict=True)):
        if any(layer is other for other in list(layers_of(model))[:number]):
            continue
        handles.append(part.output.register_forward_pre_hook(_keep(seen, "heads", number)))
        handles.append(part.down.register_forward_pre_hook(_keep(seen, "neurons", number)))
        handles.append(layer.register_forward_hook(_keep_both(seen, number)))
    rows = 0
    try:
        for batch in batches:
            seen.clear()
            model.zero_grad(set_to_none=True)
            loss = loss_of(model, batch)
            loss.backward()
            for number in range(count):
                if ("heads", number) not in seen:
                    continue
                size = parts[number].head_size
                change = _changes(seen["heads", number])
                heads[number] += change.view(len(change), -1, size).sum(dim=-1).abs().sum(dim=0)
                neurons[number] += _changes(seen["neurons", number]).abs().sum(dim=0)
                given, made = seen["in", number], seen["out", number]
                if made.grad is not None:
                    added = (made.detach() - given.detach()).double() * made.grad.double()
                    layers[number] += added.flatten(1).sum(dim=1).abs().sum()
            rows += len(seen["heads", 0])
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
    unit = [[_unit(values) for values in kind] for kind in (heads, neurons)]
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


def _keep(seen: dict[tuple[str, int], Tensor], name: str, number: int) -> Callable[..., None]:
    def hook(module: Any, given: tuple[Tensor, ...]) -> None:
        if given[0].requires_grad:
            given[0].retain_grad()
        seen[name, number] = given[0]

    return hook


def _keep_both(seen: dict[tuple[str, int], Tensor], number: int) -> Callable[..., None]:
    def hook(module: Any, given: tuple[Tensor, ...], output: Any) -> None:
        made = output[0] if isinstance(output, tuple) else output
        if made.requires_grad:
            made.retain_grad()
        seen["in", number], seen["out", number] = given[0], made

    return hook
