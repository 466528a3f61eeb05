"""What the texts of a row say, as short vectors, and the choice of rows that say different things."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calibration.roles import TRUTH

Array = np.ndarray
WIDTH = 256
"""Elements of a vector: unrelated texts then come out as orthogonal within about 1/16."""
WINDOWS = (3, 6)
"""Bytes that are counted together: parts of words and short words, or one and two characters of three bytes each."""
SCALE = 2048
"""The length of a vector. Products of such vectors of whole numbers stay below 2**24, so that float32 adds them up
exactly, in whatever order: rows are chosen alike on every machine."""
_MOST_BYTES = 1 << 16
_GOLDEN = np.uint32(2654435769)  # 2**32 over the golden ratio: multiplication by it spreads bits upwards


def content_vector(row: Mapping[str, Any]) -> Array | None:
    """Counts of the byte sequences in a row's texts, hashed to a vector: alike texts have vectors of one direction.

    Each window of `WINDOWS` bytes adds 1 or -1, by its hash, to the element that its hash names: with signs, collisions
    cancel on average (K. Weinberger et al., "Feature Hashing for Large Scale Multitask Learning", 2009). Square roots
    keep endings and articles, which all texts share, from outweighing the rest. Only what a model reads counts: no
    labels or answers. Upper and lower case are the same.

    Args:
        row: By role; see `calibration.datasets.Dataset`.

    Returns:
        float32 (WIDTH,), whole numbers, of length `SCALE` but for their rounding; ``None`` where the row has no text.
    """
    values = [value for role, value in row.items() if role not in TRUTH and role != "id"]
    texts = [" ".join(value) if isinstance(value, list) else value for value in values if isinstance(value, str | list)]
    if not texts:
        return None
    counts = np.zeros(WIDTH, np.int64)
    for text in texts:
        encoded = f" {text[:_MOST_BYTES].lower()} ".encode("utf-8", "surrogatepass")
        counts += _hashed(np.frombuffer(encoded, np.uint8)[:_MOST_BYTES].astype(np.uint32))
    if not counts.any():  # an empty text: like other empty ones, and unlike the rest
        counts[0] = 1
    roots = np.sign(counts) * np.sqrt(np.abs(counts))
    return np.rint(roots * (SCALE / np.sqrt(np.abs(counts).sum()))).astype(np.float32)


def _hashed(values: Array) -> Array:
    """Signed counts of all windows of a text's bytes (uint32, one per byte), int64 (WIDTH,)."""
    counts = np.zeros(WIDTH, np.int64)
    for window in WINDOWS:
        if len(values) < window:
            continue
        hashes = np.full(len(values) - window + 1, window, np.uint32)
        for place in range(window):
            hashes = (hashes + values[place : place + len(hashes)]) * _GOLDEN  # modulo 2**32
        elements = hashes >> np.uint32(32 - WIDTH.bit_length() + 1)
        positive = (hashes & np.uint32(1 << 16)) != 0
        counts += np.bincount(elements[positive], minlength=WIDTH)
        counts -= np.bincount(elements[~positive], minlength=WIDTH)
    return counts


def farthest(vectors: Array, parts: Sequence[tuple[Array, int]]) -> list[int]:
    """From each part its number of rows, each the one least like all that are chosen before it (greedy k-center).

    After T. Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985; here each part has a share to
    keep besides. The parts take turns, and all see what the others chose, so that a row like one in another part comes
    late too.

    Args:
        vectors: float32 (rows, WIDTH), see `content_vector`; likeness is their product, which is the cosine.
        parts: Rows of each part, in an order that decides between equals (the first row is taken as it comes), and how
            many to take, at most all.

    Returns:
        Rows in the order of their choice.
    """
    nearest = np.full(len(vectors), -np.inf, np.float32)  # likeness to the most alike of the chosen rows
    left = [share for _, share in parts]
    chosen: list[int] = []
    while any(left):
        for number, (part, _) in enumerate(parts):
            if not left[number]:
                continue
            row = int(part[np.argmin(nearest[part])])
            np.maximum(nearest, vectors @ vectors[row], out=nearest)
            nearest[row] = np.inf  # never again
            chosen.append(row)
            left[number] -= 1
    return chosen
