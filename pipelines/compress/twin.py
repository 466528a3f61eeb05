"""The dense twin of a sparse model: the same shapes without a zero, to see what the zeros are worth in time."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from pipelines.compress.weights import weight_matrices

if TYPE_CHECKING:
    import torch
    from torch import nn

_USUAL_DEVIATION = 0.02
"""Of weights in a matrix that holds nothing else than zeros: with it transformers are initialised."""


def fill_zeros(module: nn.Module) -> int:
    """Put random numbers in place of the zeros of linear and convolutional weights, and count them.

    They are normal, of the standard deviation of the matrix's other elements, and the same for the same matrix, so that
    equal layers stay equal and the twin of a model is always the same one.
    """
    filled = 0
    for _, weight, _ in weight_matrices(module):
        zero = weight.detach() == 0
        count = int(zero.sum())
        if count:
            weight.data[zero] = _noise(weight.detach(), zero, count)
            filled += count
    return filled


def _noise(weight: torch.Tensor, zero: torch.Tensor, count: int) -> torch.Tensor:
    import torch

    others = weight[~zero]
    deviation = float(others.std()) if len(others) > 1 else 0.0
    digest = hashlib.sha256(weight.contiguous().numpy().tobytes()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    noise = torch.randn(count, generator=generator) * (deviation or _USUAL_DEVIATION)
    noise[noise == 0] = deviation or _USUAL_DEVIATION
    return noise
