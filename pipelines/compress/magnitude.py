"""Setting the smallest weights to zero, and keeping them there while the others are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from exporter.errors import RequestError
from exporter.structure.anatomy import linear_weights, supported_types

Masks = dict[str, Tensor]
_PRUNED = 0.05


def smallest_masked(weights: Sequence[tuple[str, Any]], sparsity: float, scope: str) -> Masks:
    """For each weight matrix which elements stay, bool of its shape: the largest ones (S. Han et al., "Learning both
    Weights and Connections for Efficient Neural Networks", 2015).

    Args:
        weights: By name.
        sparsity: Share that goes, above 0 and below 1.
        scope: ``global``: the smallest of all matrices together, or ``layer``: the same share of each.

    Raises:
        RequestError: A matrix would be left empty.
    """
    if scope == "global":
        sizes = torch.cat([weight.detach().abs().flatten() for _, weight in weights])
        parts = _largest(sizes, sparsity).split([weight.numel() for _, weight in weights])
        masks = {name: part.view(weight.shape) for (name, weight), part in zip(weights, parts, strict=True)}
    else:
        masks = {name: _largest(w.detach().abs().flatten(), sparsity).view(w.shape) for name, w in weights}
    if empty := [name for name, mask in masks.items() if not mask.any()]:
        told = f"{', '.join(empty[:3])} at a sparsity of {sparsity:g}"
        remedy = "Lower the sparsity" + (", or prune with scope: layer" if scope == "global" else "")
        raise RequestError("pruning would leave a weight matrix empty", told, remedy)
    return masks


def two_of_four(weights: Sequence[tuple[str, Any]]) -> Masks:
    """For each matrix the two largest of every four neighbours along its inputs (A. Mishra et al., "Accelerating Sparse
    Deep Neural Networks", 2021, section 3).

    Raises:
        RequestError: A matrix has a number of inputs that four does not divide.
    """
    masks = {}
    for name, weight in weights:
        if weight.shape[1] % 4:
            told = f"{name} has {weight.shape[1]} inputs"
            raise RequestError(
                "a matrix cannot be divided into groups of four", told, "Prune before removing heads or neurons"
            )
        groups = weight.detach().abs().reshape(weight.shape[0], -1, 4)
        kept = groups.topk(2, dim=-1).indices
        masks[name] = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, kept, True).view_as(weight)
    return masks


def apply_masks(model: Any, masks: Masks) -> None:
    """Set to zero what the masks do not keep."""
    with torch.no_grad():
        for name, weight in linear_weights(model):
            if name in masks:
                weight.mul_(masks[name].to(weight.device))


def zeros_of(model: Any) -> Masks:
    """Masks of the matrices that an earlier step pruned: those with a twentieth of zeros or more, which stay zero.

    Empty where the inside of the model is not known: of such a model nothing was pruned here.
    """
    if str(getattr(model.config, "model_type", "")) not in supported_types():
        return {}
    kept = {name: weight.detach() != 0 for name, weight in linear_weights(model)}
    return {name: mask for name, mask in kept.items() if float(mask.float().mean()) <= 1 - _PRUNED}


def sparsity_at(part: float, final: float) -> float:
    """The sparsity after a `part` (0 to 1) of a gradual pruning: it grows fast at first (M. Zhu and S. Gupta, "To
    prune, or not to prune", 2017, equation 1).

    >>> sparsity_at(0.5, 0.8), sparsity_at(1.0, 0.8)
    (0.7, 0.8)
    """
    return final - final * (1 - part) ** 3


class KeepZeros(TrainerCallback):
    """Prunes in `parts` steps over the first half of a training, and keeps at zero what was pruned."""

    def __init__(self, sparsity: float | None, scope: str, parts: int, masks: Masks | None) -> None:
        self.sparsity, self.scope, self.parts = sparsity, scope, parts
        self.masks = masks or {}
        self.done = parts if masks else 0

    @property
    def unfinished(self) -> bool:
        """Whether less is zero than was asked for."""
        return self.done < self.parts

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.done == 0 and state.global_step:  # an interrupted training goes on: what is zero was pruned
            self.masks = {name: weight.detach() != 0 for name, weight in linear_weights(bare(model))}
            self.done = sum(state.global_step >= self._due(part, state.max_steps) for part in range(1, self.parts + 1))

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.sparsity is None or self.done == self.parts:
            return
        step, last = state.global_step, state.max_steps - 1
        while self.done < self.parts and (step >= self._due(self.done + 1, state.max_steps) or step == last):
            self.done += 1
            share = sparsity_at(self.done / self.parts, self.sparsity)
            self.masks = smallest_masked(list(linear_weights(bare(model))), share, self.scope)
            apply_masks(bare(model), self.masks)

    def _due(self, part: int, steps: int) -> int:
        return round((part - 1) * steps / 2 / self.parts)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        apply_masks(bare(model), self.masks)


def bare(model: Any) -> Any:
    """A model without what distributed training wraps it in."""
    return getattr(model, "module", model)


def _largest(sizes: Tensor, share: float) -> Tensor:
    """Which elements stay for exactly `share` of them to go; of equal ones the first go."""
    count = round(share * sizes.numel())
    if count == 0:
        return torch.ones_like(sizes, dtype=torch.bool)
    limit = sizes.kthvalue(count).values
    kept = sizes > limit
    equal = (sizes == limit).nonzero().flatten()
    kept[equal[len(equal) - (sizes.numel() - count - int(kept.sum())) :]] = True
    return kept


__all__ = ["KeepZeros", "Masks", "apply_masks", "bare", "smallest_masked", "sparsity_at", "two_of_four", "zeros_of"]
