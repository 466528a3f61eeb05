"""Parity: how far a variant's outputs are from the original's on the same inputs, measured and judged.

Padding. An output at a padded position is read by nobody: what stands there is not part of what a model promises, and
runtimes may differ there for good reasons (a kernel that skips padding, a row of local attention with nothing to
attend to). So errors are judged on the positions that count, and those over all positions are reported beside them.
NaN and Inf are judged everywhere: later pooling multiplies padding by zero, and zero times NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Array = np.ndarray
_CHUNK_ELEMENTS = 1 << 21  # float64 copies of a chunk stay below 100 MB, whatever the size of the logits


@dataclass(frozen=True)
class OutputError:
    """The error of one output, `a`, against the reference, `b`.

    Attributes:
        max_abs: Largest ``|a - b|`` where both are finite and the position counts.
        rms_relative: ``‖a - b‖ / ‖b‖`` over those positions (0 where both are zero, infinite where only `b` is).
        rms_relative_all: The same over all positions, padding included.
        rms_error: Root mean square of ``a - b`` over the finite entries that count, in the output's own unit.
        magnitude: Root mean square of `b` over them.
        cosine_min: Smallest cosine between corresponding vectors of the last axis at positions that count.
        top1_agreement: For logits, the share of positions with the same largest entry of the last axis; else ``None``.
        nan: NaN values in `a`, at any position.
        inf: Infinite values in `a`, at any position.
        nonfinite_mismatch: Positions where `a` and `b` differ in being NaN, +Inf or -Inf.
        shape: Shape of `a`.
        shape_expected: Shape of `b`.
    """

    max_abs: float
    rms_relative: float
    rms_relative_all: float
    rms_error: float
    magnitude: float
    cosine_min: float
    top1_agreement: float | None
    nan: int
    inf: int
    nonfinite_mismatch: int
    shape: tuple[int, ...]
    shape_expected: tuple[int, ...]

    @property
    def same_shape(self) -> bool:
        return self.shape == self.shape_expected

    def relative_to(self, usual: float) -> float:
        """The RMS error relative to the magnitude of this reference, or to the `usual` one where that is larger.

        A few numbers can be small by chance (a single score near zero): relative to themselves any rounding error is
        large. With 0 for `usual` this is `rms_relative`.
        """
        if not self.same_shape or self.magnitude >= usual:
            return self.rms_relative
        return self.rms_error / usual

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"shape": list(self.shape), "shape_expected": list(self.shape_expected)}


def compare(
    reference: Mapping[str, Array],
    actual: Mapping[str, Array],
    *,
    logits: set[str] | frozenset[str] = frozenset(),
    valid: Array | None = None,
) -> dict[str, OutputError]:
    """The error of every output of `reference`; sums run in float64 over chunks.

    Args:
        reference: The original's outputs by name, any floating or integer dtype.
        actual: The variant's outputs; one that is missing counts as one of another shape.
        logits: Outputs for which top-1 agreement means something.
        valid: Shape (batch, sequence), non-zero where a position counts (the attention mask). It applies to outputs
            whose first two dimensions are its own; others (pooled vectors, class logits) count wholly.
    """
    errors = {}
    for name, expected in reference.items():
        got = actual.get(name)
        if got is None or got.shape != expected.shape:
            shape = () if got is None else tuple(got.shape)
            errors[name] = _of_another_shape(got, shape, tuple(expected.shape), name in logits)
        else:
            errors[name] = _compare_output(expected, got, name in logits, _counting(valid, expected))
    return errors


def relative_rms(reference: Array, actual: Array, usual: float = 0.0) -> float:
    """``‖actual - reference‖ / ‖reference‖`` in float64 over finite entries (see `OutputError.relative_to`)."""
    return _compare_output(reference, actual, False, None).relative_to(usual)


class Magnitudes:
    """The usual magnitude of every output: the root mean square over cases that are equal in weight."""

    def __init__(self) -> None:
        self._squares: dict[str, list[float]] = {}

    def add(self, outputs: Mapping[str, Array], valid: Array | None = None) -> None:
        """Count one case; `valid` as in `compare`."""
        for name, error in compare(outputs, outputs, valid=valid).items():
            self._squares.setdefault(name, []).append(error.magnitude**2)

    def usual(self) -> dict[str, float]:
        return {name: float(np.sqrt(np.mean(squares))) for name, squares in self._squares.items()}


def _counting(valid: Array | None, output: Array) -> Array | None:
    """`valid` as booleans where it applies to `output`."""
    if valid is None or output.ndim < 2 or output.shape[:2] != valid.shape:
        return None
    return np.asarray(valid) != 0


def _of_another_shape(
    got: Array | None, shape: tuple[int, ...], expected: tuple[int, ...], logits: bool
) -> OutputError:
    finite = np.zeros(0) if got is None else np.asarray(got, dtype=np.float64)
    return OutputError(
        max_abs=float("inf"),
        rms_relative=float("inf"),
        rms_relative_all=float("inf"),
        rms_error=float("inf"),
        magnitude=0.0,
        cosine_min=-1.0,
        top1_agreement=0.0 if logits else None,
        nan=int(np.isnan(finite).sum()),
        inf=int(np.isinf(finite).sum()),
        nonfinite_mismatch=0,
        shape=shape,
        shape_expected=expected,
    )


class _Sums:
    """Running sums over positions that count, or over all."""

    def __init__(self) -> None:
        self.difference = 0.0
        self.reference = 0.0
        self.entries = 0

    def add(self, difference: Array, reference: Array, entries: int) -> None:
        self.entries += entries
        self.difference += float(np.sum(difference * difference))
        self.reference += float(np.sum(reference * reference))

    def relative(self) -> float:
        if self.difference == 0.0:
            return 0.0
        return float(np.sqrt(self.difference / self.reference)) if self.reference else float("inf")

    def mean(self, total: float) -> float:
        """Root of the mean of squares whose sum is `total`."""
        return float(np.sqrt(total / self.entries)) if self.entries else 0.0


def _compare_output(expected: Array, got: Array, logits: bool, valid: Array | None) -> OutputError:
    counting, everywhere = _Sums(), _Sums()
    largest, cosine = 0.0, 1.0
    nan = inf = mismatch = same_top = tops = 0
    for b, a, counts in _chunks(expected, got, valid):
        finite_a, finite_b = np.isfinite(a), np.isfinite(b)
        if not (finite_a.all() and finite_b.all()):
            nan_a = np.isnan(a)
            nan += int(nan_a.sum())
            inf += int((~finite_a & ~nan_a).sum())
            alike = (finite_a & finite_b) | (nan_a & np.isnan(b)) | (a == b)
            mismatch += int((~alike).sum())
            both = finite_a & finite_b
            reference, value = np.where(both, b, 0.0), np.where(both, a, 0.0)
        else:
            both = None
            reference, value = b, a
        difference = value - reference
        everywhere.add(difference, reference, _entries(both, None, b))
        if counts is not None:
            difference, reference, value = difference * counts, reference * counts, value * counts
        counting.add(difference, reference, _entries(both, counts, b))
        if difference.size:
            largest = max(largest, float(np.abs(difference).max()))
            cosine = min(cosine, _smallest_cosine(reference, value))
        if logits and a.shape[-1]:
            hidden = None if counts is None else np.broadcast_to(counts == 0, a.shape)
            rows = np.ones(len(a), bool) if hidden is None else ~hidden.all(axis=1)
            top_a, top_b = (_top(x, hidden) for x in (a, b))
            same_top += int((top_a == top_b)[rows].sum())
            tops += int(rows.sum())
    return OutputError(
        max_abs=largest,
        rms_relative=counting.relative(),
        rms_relative_all=everywhere.relative(),
        rms_error=counting.mean(counting.difference),
        magnitude=counting.mean(counting.reference),
        cosine_min=cosine,
        top1_agreement=(same_top / tops if tops else 1.0) if logits else None,
        nan=nan,
        inf=inf,
        nonfinite_mismatch=mismatch,
        shape=tuple(got.shape),
        shape_expected=tuple(expected.shape),
    )


def _entries(finite: Array | None, counts: Array | None, values: Array) -> int:
    """How many entries of a chunk are finite on both sides and count."""
    if counts is None:
        return values.size if finite is None else int(finite.sum())
    shown = np.broadcast_to(counts != 0, values.shape)
    return int(shown.sum() if finite is None else (shown & finite).sum())


def _chunks(expected: Array, got: Array, valid: Array | None) -> Iterator[tuple[Array, Array, Array | None]]:
    """Chunks of vectors (last axis) in float64, with 1 or 0 per entry or vector for those that count or not."""
    width = expected.shape[-1] if expected.ndim else 1
    b, a = expected.reshape(-1, width), got.reshape(-1, width)
    counts: Array | None = None
    if valid is not None:
        # (batch, sequence) alone: the mask runs along the last axis; with more dimensions, a position holds vectors.
        counts = valid if expected.ndim == 2 else np.repeat(valid.reshape(-1), max(1, len(b) // valid.size))[:, None]
        counts = counts.astype(np.float64)
    step = max(1, _CHUNK_ELEMENTS // max(1, width))
    for start in range(0, len(b), step):
        part = slice(start, start + step)
        yield b[part].astype(np.float64), a[part].astype(np.float64), None if counts is None else counts[part]


def _smallest_cosine(reference: Array, value: Array) -> float:
    """The smallest cosine of corresponding rows: 1 where both are zero, 0 where one is."""
    norms = np.linalg.norm(reference, axis=1) * np.linalg.norm(value, axis=1)
    dots = np.einsum("ij,ij->i", reference, value)
    zero = norms == 0
    cosines = np.divide(dots, norms, out=np.zeros_like(dots), where=~zero)
    cosines[zero & (reference == value).all(axis=1)] = 1.0
    return float(np.clip(cosines.min(), -1.0, 1.0))


def _top(values: Array, hidden: Array | None) -> Array:
    shown = values if hidden is None else np.where(hidden, -np.inf, values)
    return np.nan_to_num(shown, nan=-np.inf, posinf=np.inf, neginf=-np.inf).argmax(axis=1)
