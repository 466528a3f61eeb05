"""Weights in blocks: packed as the operator's definition says, rounded no worse than to the nearest step."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.quantize.blocks import BlockWeight, quantize_blocks
from exporter.errors import RequestError

Array = np.ndarray


def integer(packed: Array, index: int, bits: int) -> int:
    """One integer of a row of bytes, as the definition of `MatMulNBits` says: the lower half of a byte comes first."""
    return int(packed[index]) if bits == 8 else int(packed[index // 2]) >> 4 * (index % 2) & 15


def by_definition(made: BlockWeight, columns: int) -> Array:
    """The matrix that is stored, one element after the other."""
    restored = np.zeros((made.rows, columns), np.float32)
    for column in range(columns):
        for row in range(made.rows):
            block, inside = divmod(row, made.block_size)
            zero = 2 ** (made.bits - 1) if made.zeros is None else integer(made.zeros[column], block, made.bits)
            value = integer(made.packed[column, block], inside, made.bits)
            restored[row, column] = np.float32(value - zero) * made.scales[column, block]
    return restored


def nearest(block: Array, bits: int, symmetric: bool) -> Array:
    """A block rounded to steps of its range (widened to hold 0), as ONNX Runtime's own quantizer does."""
    most, middle = 2**bits - 1, 2 ** (bits - 1)
    low, high = min(block.min(), 0.0), max(block.max(), 0.0)
    if symmetric:
        step, zero = (low if -low >= high else high) / -middle, middle
    else:
        step = (high - low) / most
        zero = round(-low / step) if step else 0
    if not step:
        return np.zeros_like(block)
    return (np.clip(np.round(block / step) + zero, 0, most) - zero) * step


def matrix(rows: int = 70, columns: int = 5) -> Array:
    drawn = np.random.default_rng(2).standard_normal((rows, columns)).astype(np.float32)
    drawn[:, 1] = np.abs(drawn[:, 1]) + 0.5  # one sign only
    drawn[:, 2] = -drawn[:, 1]
    drawn[:16, 3] = 0.0
    return drawn


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "block_size"), [(64, 16), (70, 16), (70, 32), (5, 32), (128, 128)])
def test_packed_as_defined_and_rounded_no_worse_than_to_the_nearest(
    bits: int, symmetric: bool, rows: int, block_size: int
) -> None:
    weight = matrix(rows)
    made = quantize_blocks(weight, bits, block_size, symmetric=symmetric)
    blocks = -(-rows // block_size)
    assert made.packed.shape == (5, blocks, block_size * bits // 8)
    assert made.scales.shape == (5, blocks)
    assert (made.zeros is None) == symmetric
    if made.zeros is not None:
        assert made.zeros.shape == (5, -(-blocks * bits // 8))
    restored = by_definition(made, 5)
    np.testing.assert_array_equal(made.restored(), restored)
    lost = float(np.linalg.norm(restored - weight) / np.linalg.norm(weight))
    assert made.rms_relative == pytest.approx(lost, rel=1e-3)
    for column in range(5):
        for start in range(0, rows, block_size):
            block, found = (array[start : start + block_size, column] for array in (weight, restored))
            plain = float(np.square(nearest(block, bits, symmetric) - block).sum())
            assert float(np.square(found - block).sum()) <= plain * 1.0001 + 1e-12


def test_a_scale_is_the_best_for_its_integers() -> None:
    weight = matrix()
    made = quantize_blocks(weight, 4, 32, symmetric=False)
    restored = made.restored()
    for start in (0, 32, 64):
        block, found = weight[start : start + 32].astype(np.float64), restored[start : start + 32].astype(np.float64)
        # The error is at right angles to what is stored: no other scale would make it smaller.
        np.testing.assert_allclose(((block - found) * found).sum(0), 0, atol=1e-4)


def test_zeros_stay_zeros_and_four_bits_cost_more_than_eight() -> None:
    weight = matrix()
    errors = {}
    for bits in (4, 8):
        for symmetric in (True, False):
            made = quantize_blocks(weight, bits, 16, symmetric=symmetric)
            assert not made.restored()[:16, 3].any()
            errors[bits, symmetric] = made.rms_relative
    assert errors[8, False] < errors[8, True] < errors[4, False] / 5 < errors[4, True] / 5
    assert quantize_blocks(np.zeros((32, 2), np.float32), 4, 32, symmetric=False).rms_relative == 0


def test_many_blocks_are_rounded_like_few(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantize_blocks(matrix(), 4, 16, symmetric=False)
    monkeypatch.setattr("calibration.quantize.blocks._CHUNK_BLOCKS", 3)
    parts = quantize_blocks(matrix(), 4, 16, symmetric=False)
    np.testing.assert_array_equal(parts.packed, whole.packed)
    np.testing.assert_array_equal(parts.restored(), whole.restored())


@pytest.mark.parametrize(("bits", "block_size", "told"), [(3, 32, "so many bits"), (4, 8, "size"), (8, 48, "size")])
def test_what_the_operator_does_not_take(bits: int, block_size: int, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        quantize_blocks(matrix(), bits, block_size, symmetric=False)
