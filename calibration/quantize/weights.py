"""Weights of 8 bits, symmetric, with a scale per output channel: int8, or FP8 (E4M3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np

Array = np.ndarray
Numbers = Literal["int8", "fp8"]
LARGEST: dict[Numbers, float] = {"int8": 127, "fp8": 448}
"""The largest number used; of int8, -128 is not, so that both sides are alike."""
DTYPES: dict[Numbers, np.dtype] = {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn)}
SMALLEST_SCALE = np.finfo(np.float32).tiny
"""Below it a scale loses its digits, and ends at zero, by which nothing can be divided."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight in 8 bits.

    Attributes:
        values: int8 or float8_e4m3fn, in the weight's shape.
        scales: float32 (channels,): a step per output channel; of shape () where one serves all.
        axis: The axis of the output channels; ``None`` where one step serves all.
        rms_relative: ``‖restored − original‖ / ‖original‖``; 0 for a weight of zeros.
    """

    values: Array
    scales: Array
    axis: int | None
    rms_relative: float

    def restored(self) -> Array:
        """float32: what the values stand for."""
        return self.values.astype(np.float32) * _along(self.scales, self.axis, self.values.ndim)


def _along(scales: Array, axis: int | None, rank: int) -> Array:
    return scales if axis is None else scales.reshape([-1 if i == axis else 1 for i in range(rank)])


def quantize_weight(weight: Array, axis: int | None, numbers: Numbers = "int8") -> QuantizedWeight:
    """Round a float weight to 8 bits, symmetric about zero, with the largest value of each channel at ±127 (int8) or
    ±448 (FP8).

    Args:
        weight: float32, two dimensions or more.
        axis: The axis of the output channels; ``None`` takes one step for the whole weight.
        numbers: What it is rounded to.
    """
    largest = LARGEST[numbers]
    others = None if axis is None else tuple(i for i in range(weight.ndim) if i != axis)
    bound = np.abs(weight).max(axis=others)
    # A channel of zeros has no step of its own; any serves.
    scales = np.asarray(np.where(bound > 0, np.maximum(bound / largest, SMALLEST_SCALE), 1.0), dtype=np.float32)
    steps = _along(scales, axis, weight.ndim)
    values = rounded(weight / steps, numbers)
    lost = values.astype(np.float64) * steps - weight
    size = float(np.linalg.norm(weight.astype(np.float64)))
    return QuantizedWeight(values, scales, axis, float(np.linalg.norm(lost)) / size if size else 0.0)


def rounded(scaled: Array, numbers: Numbers) -> Array:
    """The nearest numbers of 8 bits, ties to even; what lies beyond the largest becomes that.

    NaN stays NaN in FP8; integers have none. FP8 is E4M3 without infinities, as ONNX rounds to it with ``saturate``.
    """
    kept = np.clip(scaled, -LARGEST[numbers], LARGEST[numbers])
    return (np.round(kept) if numbers == "int8" else kept).astype(DTYPES[numbers])
