"""Weight sharing within a matrix: k-means over its elements, and training that keeps what is shared shared.

S. Han, H. Mao and W. Dally, "Deep Compression", 2016, section 3: the values of a matrix are replaced by the centre of
their cluster, beginning from centres spread evenly over the range, which keeps the rare large ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from exporter.structure.anatomy import linear_weights
from pipelines.compress.magnitude import bare

_ROUNDS = 30
_BINS = 4096


def cluster(weight: Tensor, count: int) -> Tensor:
    """Which of `count` values each element takes, int64 of the weight's shape; zeros keep a value of their own.

    Lloyd's algorithm over a histogram of the elements: the result differs from that over all of them by less than the
    width of a bin.
    """
    values = weight.detach().double().flatten()
    low, high = float(values.min()), float(values.max())
    if high <= low:
        return torch.zeros_like(weight, dtype=torch.int64)
    zeros = values == 0
    own = bool(zeros.any()) and count > 1  # a pruned weight stays one
    groups = count - own
    places = ((values - low) / (high - low) * (_BINS - 1)).round().long()
    held = places[~zeros] if own else places
    mass = torch.bincount(held, minlength=_BINS).double()
    centres_of_bins = torch.linspace(low, high, _BINS, dtype=torch.float64)
    centres = torch.linspace(low, high, groups, dtype=torch.float64)
    nearest = torch.zeros(_BINS, dtype=torch.int64)
    for _ in range(_ROUNDS):
        edges = (centres[1:] + centres[:-1]) / 2
        nearest = torch.bucketize(centres_of_bins, edges)
        weights = torch.zeros(groups, dtype=torch.float64).index_add_(0, nearest, mass)
        sums = torch.zeros(groups, dtype=torch.float64).index_add_(0, nearest, mass * centres_of_bins)
        moved = torch.where(weights > 0, sums / weights.clamp(min=1e-300), centres)
        if torch.equal(moved, centres):
            break
        centres = moved.sort().values
    codes = nearest[places]
    if own:
        codes = torch.where(zeros, groups, codes)
    return codes.view(weight.shape)


def share_values(weight: Tensor, codes: Tensor) -> None:
    """Give all elements of a cluster their mean, in place; a cluster of zeros stays one."""
    flat, index = weight.detach().double().flatten(), codes.flatten().to(weight.device)
    count = int(index.max()) + 1
    sums = torch.zeros(count, dtype=torch.float64, device=weight.device).index_add_(0, index, flat)
    members = torch.bincount(index, minlength=count).clamp(min=1)
    with torch.no_grad():
        weight.copy_((sums / members)[index].to(weight.dtype).view(weight.shape))


class KeepShared(TrainerCallback):
    """After each optimizer step gives the elements of every cluster their mean again: they move together.

    The zeros of a pruned matrix stay where they are.
    """

    def __init__(self, codes: dict[str, Tensor]) -> None:
        self.codes = codes
        self.zeros: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.zeros = {name: weight.detach() == 0 for name, weight in linear_weights(bare(model)) if name in self.codes}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        for name, weight in linear_weights(bare(model)):
            if name in self.codes:
                with torch.no_grad():
                    weight.masked_fill_(self.zeros[name], 0.0)
                share_values(weight, self.codes[name])


def cluster_all(weights: Sequence[tuple[str, Any]], count: int) -> dict[str, Tensor]:
    """Cluster every matrix by itself and share its values; returns the codes by name."""
    codes = {}
    for name, weight in weights:
        codes[name] = cluster(weight, count)
        share_values(weight, codes[name])
    return codes
