"""What a constant loses in half precision, and its conversion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.precision.schemas import HalfType

if TYPE_CHECKING:
    import onnx_ir as ir

_CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class ConstantStats:
    """A float32 constant, beside what is left of it in half precision.

    Attributes:
        elements: How many numbers it holds.
        largest: Largest absolute value among the finite ones (0 when there are none).
        non_finite: How many are infinite or NaN; both half types have these too.
        beyond: How many finite ones lie outside the half type's finite range.
        flushed: How many become zero without being zero.
        rms_relative: ``‖x − half(x)‖ / ‖x‖`` over the finite ones, without dimension; ``0`` for an all-zero constant.
    """

    elements: int
    largest: float
    non_finite: int
    beyond: int
    flushed: int
    rms_relative: float


def measure_constant(array: np.ndarray, half: HalfType) -> ConstantStats:
    """Compare a float32 array with its half-precision form, a megabyte at a time."""
    dtype = half.numpy_dtype()
    flat = array.reshape(-1)
    largest, non_finite, beyond, flushed, norm, error = 0.0, 0, 0, 0, 0.0, 0.0
    for start in range(0, flat.size, _CHUNK_ELEMENTS):
        chunk = np.asarray(flat[start : start + _CHUNK_ELEMENTS], dtype=np.float32)
        finite = np.isfinite(chunk)
        if not finite.all():
            non_finite += int(chunk.size - finite.sum())
            chunk = chunk[finite]
        if not chunk.size:
            continue
        top = float(np.abs(chunk).max())
        largest = max(largest, top)
        if top > half.largest:
            beyond += int((np.abs(chunk) > half.largest).sum())
            chunk = np.clip(chunk, -half.largest, half.largest)
        kept = chunk.astype(dtype).astype(np.float32)
        flushed += int(((kept == 0) & (chunk != 0)).sum())
        wide = chunk.astype(np.float64)
        norm += float(np.dot(wide, wide))
        wide -= kept
        error += float(np.dot(wide, wide))
    relative = float(np.sqrt(error / norm)) if norm > 0 else 0.0
    return ConstantStats(int(flat.size), largest, non_finite, beyond, flushed, relative)


def to_half(array: np.ndarray, half: HalfType) -> np.ndarray:
    """Round to `half`, to nearest even. Finite values beyond its range become its largest finite ones, infinities
    stay infinite."""
    array = np.asarray(array, dtype=np.float32)
    limited = np.clip(array, -half.largest, half.largest)
    return np.where(np.isinf(array), array, limited).astype(half.numpy_dtype())


def half_tensor(tensor: ir.TensorProtocol, half: HalfType, name: str) -> ir.LazyTensor:
    """`tensor` in half precision, converted when it is written, so that a large model is never twice in memory."""
    import onnx_ir as ir

    dtype = ir.DataType(half.onnx_type)

    def converted() -> ir.Tensor:
        return ir.Tensor(to_half(tensor.numpy(), half), dtype=dtype, name=name)

    return ir.LazyTensor(converted, dtype=dtype, shape=ir.Shape(tensor.shape), name=name)


def describe(stats: ConstantStats) -> dict[str, Any]:
    """The figures that a decision about a constant shows."""
    return {"elements": stats.elements, "largest_abs": stats.largest, "rms_relative": stats.rms_relative}
