"""Figures of weight matrices: how sparse, in which pattern, of which rank, of how many values."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

MOST_VALUES = 256
"""A matrix of so few values can be stored as a byte per element and a table."""
RANK_RULE = (
    "singular values above the largest x max(rows, columns) x the FP32 machine epsilon, as numpy.linalg.matrix_rank "
    "counts them (W. H. Press et al., Numerical Recipes, 2007, section 2.6); low is below half of the rows and columns "
    "that are not all zero"
)
_REPEATED = re.compile(r"\.\d+\.")
_BEHIND = "sentence_head."
"""Pooling and dense layers behind the encoder: their weights are in files of their own."""


@dataclass(frozen=True)
class MatrixFacts:
    """One weight matrix of a linear or convolutional layer.

    Attributes:
        name: Of the parameter.
        shape: As stored.
        elements: Of the matrix.
        zeros: How many of them are zero.
        groups: Whole groups of four consecutive elements along the input dimension.
        conforming: Groups with at least two zeros: what 2:4 sparsity demands of all of them.
        values: Distinct values other than zero, as far as they are counted: beyond `MOST_VALUES` it is ``None``.
        rank: Numerical rank (`RANK_RULE`).
        full_rank: The most that its rows and columns allow, those that are all zero left out.
        factored: Elements of two factors of that rank, rank x (rows + columns).
    """

    name: str
    shape: tuple[int, ...]
    elements: int
    zeros: int
    groups: int
    conforming: int
    values: int | None
    rank: int
    full_rank: int
    factored: int

    @property
    def sparsity(self) -> float:
        return self.zeros / self.elements if self.elements else 0.0

    @property
    def in_layers(self) -> bool:
        """Whether it belongs to the layers that repeat, by a number in its name: pruning usually leaves the others."""
        return _REPEATED.search(self.name) is not None

    @property
    def exactly_two_four(self) -> bool:
        """Every group conforms and all elements are in groups. A matrix of zeros alone has no such pattern."""
        whole = self.groups > 0 and self.groups * 4 == self.elements
        return whole and self.conforming == self.groups and self.zeros < self.elements

    @property
    def low_rank(self) -> bool:
        return 0 < 2 * self.rank < self.full_rank

    @property
    def few_values(self) -> bool:
        """Clustered: few values, each of them used often. Small matrices have few anyway."""
        return self.values is not None and self.values > 0 and 4 * self.values <= self.elements - self.zeros

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "shape": list(self.shape),
            "sparsity": self.sparsity,
            "two_four_share": self.conforming / self.groups if self.groups else None,
            "exactly_two_four": self.exactly_two_four,
            "low_rank": self.low_rank,
            "few_values": self.few_values,
        }


def weight_matrices(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, torch.Tensor]]:
    """The weights of linear and convolutional layers, each once: name, parameter, and a view with inputs last.

    Embeddings are left out, and projections that are tied to them.
    """
    from torch import nn
    from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
    from transformers.pytorch_utils import Conv1D

    names = {id(parameter): name for name, parameter in module.named_parameters()}
    seen = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    for part in module.modules():
        if not isinstance(part, nn.Linear | _ConvNd | Conv1D) or id(part.weight) in seen:
            continue
        seen.add(id(part.weight))
        name, weight = names.get(id(part.weight), ""), part.weight
        if not name or name.startswith(_BEHIND):
            continue
        view = weight.detach()
        if isinstance(part, _ConvNd):
            view = view.movedim(0 if isinstance(part, _ConvTransposeNd) else 1, -1)
        elif isinstance(part, Conv1D):
            view = view.T
        yield name, weight, view


def measure_matrix(name: str, weight: torch.Tensor, view: torch.Tensor) -> MatrixFacts:
    """Figures of one matrix.

    Args:
        name: Of the parameter.
        weight: As stored.
        view: The same with the input dimension last.
    """
    import torch

    zero = view == 0
    length = view.shape[-1] // 4 * 4
    in_groups = zero[..., :length].reshape(-1, 4)
    flat = weight.detach().reshape(weight.shape[0], -1)
    nonzero = flat != 0
    rows, columns = int(nonzero.any(dim=1).sum()), int(nonzero.any(dim=0).sum())
    rank = _rank(flat)
    used = torch.unique(flat[nonzero])
    return MatrixFacts(
        name=name,
        shape=tuple(weight.shape),
        elements=weight.numel(),
        zeros=int(zero.sum()),
        groups=len(in_groups),
        conforming=int((in_groups.sum(dim=-1) >= 2).sum()),
        values=len(used) if len(used) <= MOST_VALUES else None,
        rank=rank,
        full_rank=min(rows, columns),
        factored=rank * (flat.shape[0] + flat.shape[1]),
    )


def _rank(matrix: torch.Tensor) -> int:
    import torch

    if not matrix.numel() or not torch.isfinite(matrix).all():
        return min(matrix.shape)
    values = torch.linalg.svdvals(matrix.float())
    return int((values > values.max() * max(matrix.shape) * torch.finfo(torch.float32).eps).sum())
