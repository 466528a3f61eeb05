"""Integer weights with a scale per block, as ONNX Runtime's `MatMulNBits` stores them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from exporter.errors import RequestError

Array = np.ndarray
SMALLEST_BLOCK = 16
CLIPS = {4: (0.9, 1.0, 1.1), 8: (0.97, 1.0, 1.03)}
"""By bits, the parts of a block's range at either end that are tried in its place: ends that are cut give the others a
finer step, and a coarser one may happen to fit."""
_CHUNK_BLOCKS = 1 << 15


@dataclass(frozen=True)
class BlockWeight:
    """A matrix (K, N) as integers: K is cut into blocks, the last one filled with zeros, each with a scale of its own.

    Attributes:
        packed: uint8 (N, blocks, block_size * bits / 8); of two 4-bit integers in a byte the first is the lower.
        scales: float32 (N, blocks).
        zeros: uint8 (N, blocks * bits / 8, rounded up): the integers that stand for 0, packed alike; ``None`` where
            that is the middle, 8 or 128.
        bits: 4 or 8.
        rows: K.
        rms_relative: ``‖restored − original‖ / ‖original‖``; 0 for a weight of zeros.
    """

    packed: Array
    scales: Array
    zeros: Array | None
    bits: int
    rows: int
    rms_relative: float

    @property
    def block_size(self) -> int:
        return int(self.packed.shape[2]) * 8 // self.bits

    def restored(self) -> Array:
        """float32 (K, N): what the integers stand for."""
        columns, blocks = self.scales.shape
        integers = _unpack(self.packed, self.bits).astype(np.float32)
        if self.zeros is None:
            zeros = np.full((columns, blocks), 1 << (self.bits - 1), np.float32)
        else:
            zeros = _unpack(self.zeros, self.bits)[:, :blocks].astype(np.float32)
        restored = (integers - zeros[..., None]) * self.scales[..., None]
        return restored.reshape(columns, -1)[:, : self.rows].T


def quantize_blocks(weight: Array, bits: int, block_size: int, *, symmetric: bool) -> BlockWeight:
    """Round a float matrix to integers of few bits.

    A block's range is widened to hold 0, which an integer then stands for exactly. Several ranges near it are
    tried (`CLIPS`); each choice of integers gets the scale with the least squared error,
    ``<w, q> / <q, q>``, and the choice that has the least is taken.

    Args:
        weight: float32 (K, N), finite.
        bits: 4 or 8.
        block_size: A power of two, 16 or more.
        symmetric: 0 is the middle integer in every block; else each block has the one that suits it.

    Raises:
        RequestError: `MatMulNBits` takes no such bits or block size.
    """
    if bits not in CLIPS:
        raise RequestError("weights cannot be stored in so many bits", bits, "Take 4 or 8")
    if block_size < SMALLEST_BLOCK or block_size & (block_size - 1):
        raise RequestError("the block size does not fit", block_size, "Take a power of two, 16 or more")
    rows, columns = weight.shape
    count = -(-rows // block_size)
    blocks = np.pad(weight, ((0, count * block_size - rows), (0, 0))).T.reshape(-1, block_size)
    integers = np.empty(blocks.shape, np.uint8)
    scales, zeros = np.empty(len(blocks), np.float32), np.empty(len(blocks), np.uint8)
    lost = 0.0
    for start in range(0, len(blocks), _CHUNK_BLOCKS):
        part = slice(start, start + _CHUNK_BLOCKS)
        integers[part], scales[part], zeros[part], errors = _round(blocks[part], bits, symmetric)
        lost += float(errors.sum(dtype=np.float64))
    size = float(np.square(weight, dtype=np.float64).sum())
    return BlockWeight(
        _pack(integers.reshape(columns, count, block_size), bits),
        scales.reshape(columns, count),
        None if symmetric else _pack(zeros.reshape(columns, count), bits),
        bits,
        rows,
        (lost / size) ** 0.5 if size else 0.0,
    )


def _round(blocks: Array, bits: int, symmetric: bool) -> tuple[Array, Array, Array, Array]:
    """Integers, scales, zero points and squared errors of blocks (count, block size)."""
    most, middle = (1 << bits) - 1, 1 << (bits - 1)
    low, high = np.minimum(blocks.min(1), 0), np.maximum(blocks.max(1), 0)
    if symmetric:
        # The far end becomes integer 0, of which there is one more than on the other side: the scale may be negative.
        far = np.where(-low >= high, low, high)
        tried = [(far * (clip / -middle), np.full(len(blocks), middle, np.float32)) for clip in CLIPS[bits]]
    else:
        tried = []
        for below, above in itertools.product(CLIPS[bits], CLIPS[bits]):
            steps = (high * above - low * below) / most
            tried.append((steps, np.round(-low * below / np.where(steps > 0, steps, 1))))
    best = np.full(len(blocks), np.inf, np.float32)
    integers, zeros = np.zeros(blocks.shape, np.uint8), np.zeros(len(blocks), np.uint8)
    scales = np.ones(len(blocks), np.float32)
    for given, zero in tried:
        steps = np.where(given != 0, given, 1).astype(np.float32)
        found = np.clip(np.round(blocks / steps[:, None]) + zero[:, None], 0, most)
        offset = found - zero[:, None]
        squares = np.einsum("ij,ij->i", offset, offset)
        scale = np.where(squares > 0, np.einsum("ij,ij->i", blocks, offset) / np.maximum(squares, 1), steps)
        apart = offset * scale[:, None] - blocks
        error = np.einsum("ij,ij->i", apart, apart)
        better = error < best
        best[better], scales[better], zeros[better] = error[better], scale[better], zero[better]
        integers[better] = found[better]
    return integers, scales, zeros, best


def _pack(values: Array, bits: int) -> Array:
    """uint8: two 4-bit integers of the last axis in a byte, the first the lower; 8-bit ones as they are."""
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, 1)])
    return np.asarray(values[..., 0::2] | values[..., 1::2] << 4, dtype=np.uint8)


def _unpack(packed: Array, bits: int) -> Array:
    if bits == 8:
        return packed
    return np.stack([packed & 0x0F, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
