"""Integer weights: symmetric int8 with a scale per output channel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray
LARGEST = 127


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as integers.

    Attributes:
        values: int8, in the weight's shape.
        scales: float32 (channels,): a step per output channel; of shape () where one serves all.
        axis: The axis of the output channels; ``None`` where one step serves all.
        rms_relative: ``‖restored − original‖ / ‖original‖``; 0 for a weight of zeros.
    """

    values: Array
    scales: Array
    axis: int | None
    rms_relative: float

    def restored(self) -> Array:
        """float32: what the integers stand for."""
        return self.values.astype(np.float32) * _along(self.scales, self.axis, self.values.ndim)


def _along(scales: Array, axis: int | None, rank: int) -> Array:
    return scales if axis is None else scales.reshape([-1 if i == axis else 1 for i in range(rank)])


def quantize_weight(weight: Array, axis: int | None) -> QuantizedWeight:
    """Round a float weight to int8, symmetric about zero, with the largest value of each channel at ±127.

    Args:
        weight: float32, two dimensions or more.
        axis: The axis of the output channels; ``None`` takes one step for the whole weight.
    """
    others = None if axis is None else tuple(i for i in range(weight.ndim) if i != axis)
    bound = np.abs(weight).max(axis=others)
    steps = np.asarray(bound / LARGEST, dtype=np.float32)
    # A channel of zeros, or of values too small for a step, has none of its own; any serves.
    scales = np.asarray(np.where(steps > 0, steps, 1.0), dtype=np.float32)
    steps = _along(scales, axis, weight.ndim)
    values = np.clip(np.round(weight / steps), -LARGEST, LARGEST).astype(np.int8)
    lost = values.astype(np.float64) * steps - weight
    size = float(np.linalg.norm(weight.astype(np.float64)))
    return QuantizedWeight(values, scales, axis, float(np.linalg.norm(lost)) / size if size else 0.0)
