from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from exporter.precision.constants import measure_constant, to_half
from exporter.precision.schemas import HALF_TYPES

FP16, BF16 = HALF_TYPES["fp16"], HALF_TYPES["bf16"]


@pytest.mark.parametrize("half", [FP16, BF16])
def test_limits_are_those_of_the_type(half: object) -> None:
    info = ml_dtypes.finfo(half.numpy_dtype())  # type: ignore[attr-defined]
    assert half.largest == float(info.max)  # type: ignore[attr-defined]
    assert half.unit_roundoff == float(info.eps) / 2  # type: ignore[attr-defined]
    n = half.largest_integer  # type: ignore[attr-defined]
    assert float(np.float32(n).astype(half.numpy_dtype())) == n  # type: ignore[attr-defined]
    assert float(np.float32(n + 1).astype(half.numpy_dtype())) != n + 1  # type: ignore[attr-defined]


def test_finite_values_saturate_and_infinities_stay() -> None:
    array = np.array([1e9, -1e9, np.inf, -np.inf, np.nan, 65504, 65510, 1.0, 0.0], np.float32)
    with np.errstate(all="raise"):
        half = to_half(array, FP16)
    expected = np.array([65504, -65504, np.inf, -np.inf, np.nan, 65504, 65504, 1, 0], np.float16)
    assert np.array_equal(half, expected, equal_nan=True)
    lowest = np.finfo(np.float32).min
    assert np.isinf(np.float32(lowest).astype(ml_dtypes.bfloat16))
    assert float(to_half(np.array(lowest), BF16)) == -BF16.largest
    assert np.isneginf(float(to_half(np.array(-np.inf), BF16)))


def test_measures_over_chunks_equal_measures_at_once() -> None:
    rng = np.random.default_rng(0)
    array = rng.standard_normal((3, 500_000)).astype(np.float32)
    array[0, 0], array[1, 7], array[2, 9], array[2, 10] = 1e6, 1e-12, np.inf, -123456.0
    stats = measure_constant(array, FP16)
    kept = np.clip(array[np.isfinite(array)], -65504, 65504)
    error = kept.astype(np.float64) - kept.astype(np.float16)
    assert stats.elements == array.size
    assert stats.largest == 1e6
    assert (stats.non_finite, stats.beyond) == (1, 2)
    assert stats.flushed == int(((kept.astype(np.float16) == 0) & (kept != 0)).sum()) >= 1
    assert stats.rms_relative == pytest.approx(
        np.linalg.norm(error) / np.linalg.norm(kept.astype(np.float64)), rel=1e-9
    )


def test_nothing_to_lose() -> None:
    assert measure_constant(np.zeros(4, np.float32), FP16).rms_relative == 0
    assert measure_constant(np.full(3, -np.inf, np.float32), FP16).largest == 0
    assert measure_constant(np.empty(0, np.float32), FP16).elements == 0
