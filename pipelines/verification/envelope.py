"""The inputs on which parity is measured: real samples, and the corners of the shapes that the model accepts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from exporter.artifact import InputContract, Signature, TensorSpec
from exporter.errors import RequestError

Array = np.ndarray
Row = Mapping[str, Array]

DEFAULT_BUDGET_ELEMENTS = 2**24
"""Attention scores per head (batch x length x length) that a case may have: at 4 bytes and 16 heads, 1 GiB."""
_SAMPLE_BATCH = 8
_LARGEST_BATCH = 32
_SHORT_LENGTH = 16


@dataclass(frozen=True)
class Case:
    """One set of inputs for parity.

    Attributes:
        name: Unique, short, and telling.
        inputs: By name, batched, with the dtypes of the samples.
        kind: ``sample``, ``shape``, ``ragged``, ``left-padded``, ``right-padded``, ``unattended``, ``alone``.
        partner: For ``alone``: the name of the case that holds the same sample in a padded batch.
        row: For ``alone``: the sample's row there. It starts at position 0 of the row (right padding).
    """

    name: str
    inputs: dict[str, Array]
    kind: str
    partner: str | None = None
    row: int | None = None

    def shape(self, signature: Signature) -> str:
        """The sizes of the dynamic axes, as ``"8x128"``."""
        return "x".join(str(size) for size in axis_sizes(self.inputs, signature).values())


def axis_sizes(inputs: Mapping[str, Array], signature: Signature) -> dict[str, int]:
    """The size of every dynamic axis in these inputs, in the signature's order."""
    found: dict[str, int] = {}
    for spec in signature.inputs:
        for dim, size in zip(spec.shape, inputs[spec.name].shape, strict=True):
            if isinstance(dim, str):
                found[dim] = size
    return {axis.name: found[axis.name] for axis in signature.axes if axis.name in found}


def counting_positions(case: Case, contract: InputContract) -> Array | None:
    """Where the case's outputs count, shape (batch, sequence), boolean: the positions that its mask attends to.

    A row that attends to nothing counts wholly: only a model without the promise gets such a row, and there the
    variant has to give what the original gives. ``None`` (everything counts) for a model without a mask.
    """
    if contract.mask is None or contract.mask not in case.inputs:
        return None
    mask = np.asarray(case.inputs[contract.mask]) != 0
    return mask | ~mask.any(axis=-1, keepdims=True)


def build_cases(
    samples: Sequence[Row],
    signature: Signature,
    contract: InputContract,
    points: Sequence[tuple[int, int | None]],
    *,
    pad: Mapping[str, int | float] | None = None,
    seed: int = 0,
    budget_elements: int = DEFAULT_BUDGET_ELEMENTS,
) -> list[Case]:
    """Real samples in padded batches, then the envelope; never beyond the signature's axes.

    Args:
        samples: Encoded rows, each a batch of one without padding. All of them are used.
        signature: Inputs and axes. The axis ``batch`` counts rows; one further dynamic axis (``sequence``) is a length.
        contract: Its `mask` says which input marks padding; without one nothing is padded. Rows that attend to
            nothing are made only where the contract allows them.
        points: Operating points (batch, length); the length is ``None`` where there is none.
        pad: Padding value per input (0 where missing; always 0 for the mask).
        seed: Of the choice of rows.
        budget_elements: Largest batch x length x length of a case (without a length: largest number of input elements).
            A longest length that does not fit even alone is cut to what does, and the case's name says so.

    Raises:
        RequestError: No samples, or samples that do not fit the signature.
    """
    return _Builder(samples, signature, contract, dict(pad or {}), seed, budget_elements).build(points)


class _Builder:
    """Holds what all cases share while they are built."""

    def __init__(
        self,
        samples: Sequence[Row],
        signature: Signature,
        contract: InputContract,
        pad: dict[str, int | float],
        seed: int,
        budget: int,
    ) -> None:
        if not samples:
            raise RequestError("parity needs at least one sample", 0, "Give data with at least one row")
        self.specs = signature.inputs
        self.samples = [_checked(sample, self.specs) for sample in samples]
        self.mask = contract.mask if contract.mask in {spec.name for spec in self.specs} else None
        self.attends = contract.attends
        self.pad = pad | ({self.mask: 0} if self.mask else {})
        self.budget = budget
        self.rng = np.random.default_rng(seed)
        used = {dim for spec in self.specs for dim in spec.shape if isinstance(dim, str)}
        self.batch = next((axis for axis in signature.axes if axis.name == "batch" and "batch" in used), None)
        # With several lengths (images of free height and width) only the batch is varied: the samples give the rest.
        self.length = signature.length
        if self.length is not None and (longest := max(map(self._length_of, self.samples))) > self.length.max:
            raise RequestError("a sample is longer than the model accepts", longest, f"Cut it to {self.length.max}")

    def build(self, points: Sequence[tuple[int, int | None]]) -> list[Case]:
        cases = [*self._sample_cases()]
        if self.batch is None:
            return _distinct(cases)
        cases += self._shape_cases(points)
        if self.mask is not None and self.length is not None:
            cases += self._padding_cases(points)
        cases += self._alone_case()
        return _distinct(cases)

    # Real samples -------------------------------------------------------------------------------------------------

    def _sample_cases(self) -> Iterator[Case]:
        if self.batch is None:
            yield from (Case(f"sample-{i}", dict(sample), "sample") for i, sample in enumerate(self.samples))
            return
        step = self._batch_within(_SAMPLE_BATCH, max(map(self._length_of, self.samples)))
        for start in range(0, len(self.samples), step):
            rows = self._at_least(self.samples[start : start + step])
            for number, group in enumerate(self._stackable(rows)):
                suffix = f".{number}" if number else ""
                yield Case(f"samples-{start}{suffix}", self._stack(group), "sample")

    def _stackable(self, rows: list[Row]) -> list[list[Row]]:
        """Rows that one batch can hold: without a mask only those of the same shape."""
        if self.mask is not None and self.length is not None:
            return [rows]
        groups: dict[tuple[tuple[int, ...], ...], list[Row]] = {}
        for row in rows:
            groups.setdefault(tuple(row[spec.name].shape for spec in self.specs), []).append(row)
        return [self._at_least(group) for group in groups.values()]

    # Shapes -------------------------------------------------------------------------------------------------------

    def _shape_cases(self, points: Sequence[tuple[int, int | None]]) -> Iterator[Case]:
        assert self.batch is not None
        largest = max([_LARGEST_BATCH, *(batch for batch, _ in points)])
        if self.length is None:
            size = self._length_of(self.samples[0])
            named = {"smallest": 1, "typical-odd": 3, **{f"point-{b}": b for b, _ in points}, "largest-batch": largest}
            for name, asked in named.items():
                batch = self._batch_within(asked, size)
                full = name if name.startswith("point") else f"{name}-{batch}"
                yield Case(full, self._stack(self._same_shape(batch)), "shape")
            return
        longest = min(self.length.max, max(self.length.min, int(self.budget**0.5)))
        cut = "" if longest == self.length.max else f"-of-{self.length.max}"
        wanted: list[tuple[str, int, int]] = [
            ("smallest", 1, self.length.min),
            ("typical-odd", 3, 37),  # a length and a batch that no kernel's tile divides
            *(("point", batch, length or _SHORT_LENGTH) for batch, length in points),
            ("largest-batch", largest, _SHORT_LENGTH),
            (f"largest-length{cut}", 2, longest),
        ]
        for name, asked, length in wanted:
            length = min(max(length, self.length.min), longest)
            batch = self._batch_within(asked, length)
            yield Case(f"{name}-{batch}x{length}", self._stack([self._row_of(length) for _ in range(batch)]), "shape")

    # Padding ------------------------------------------------------------------------------------------------------

    def _padding_cases(self, points: Sequence[tuple[int, int | None]]) -> Iterator[Case]:
        assert self.length is not None
        typical = max([length for _, length in points if length] or [_SHORT_LENGTH])
        top = min(max(typical, self.length.min), self.length.max, int((self.budget / 6) ** 0.5) or 1)
        low = min(max(1, self.length.min), top)
        rows = self._at_least([self._row_of(int(n)) for n in np.geomspace(low, top, 6).round()])
        yield Case(f"ragged-{len(rows)}x{top}", self._stack(rows), "ragged")
        yield Case(f"left-padded-{len(rows)}x{top}", self._stack(rows, left=True), "left-padded")
        # Every row is padded, so that no row fills the batch and the padding itself has an odd length.
        width = min(self.length.max, top + 13)
        short = [self._row_of(max(low, min(int(n), width - 1))) for n in np.geomspace(low, top, 4).round()]
        short = self._at_least(short)
        yield Case(f"right-padded-{len(short)}x{width}", self._stack(short, width=width), "right-padded")
        if not self.attends and self.mask is not None:
            inputs = self._stack(rows)
            inputs[self.mask] = inputs[self.mask].copy()
            inputs[self.mask][len(rows) // 2] = 0
            yield Case(f"unattended-row-{len(rows)}x{top}", inputs, "unattended")

    def _alone_case(self) -> Iterator[Case]:
        """One sample alone, and the same sample as one row of a batch that is padded where padding exists."""
        if self.batch is None or self.batch.min > 1 or self.batch.max < 2:
            return
        order = sorted(range(len(self.samples)), key=lambda i: self._length_of(self.samples[i]))
        sample = self.samples[order[len(order) // 2]]
        if self.mask is not None and self.length is not None:
            own = self._length_of(sample)
            width = min(self.length.max, 2 * own + 5, max(own, int((self.budget / 4) ** 0.5)))
            others = [self._row_of(n) for n in (width, max(self.length.min, own // 2), own)]
        else:
            others = [row for row in self._same_shape(4, like=sample) if row is not sample][:3]
            others = others or [sample]
        batch = [*others[:1], sample, *others[1:]][: self.batch.max]
        size = len(batch)
        yield Case("alone-1", self._stack([sample]), "alone", partner=f"alone-1-in-batch-of-{size}", row=1)
        yield Case(f"alone-1-in-batch-of-{size}", self._stack(batch), "ragged")

    # Rows and batches ---------------------------------------------------------------------------------------------

    def _length_of(self, row: Row) -> int:
        """The row's length; without a length axis, its number of elements (what the budget then counts)."""
        if self.length is None:
            return sum(row[spec.name].size for spec in self.specs)
        spec = next(spec for spec in self.specs if self.length.name in spec.shape)
        return int(row[spec.name].shape[spec.shape.index(self.length.name)])

    def _batch_within(self, batch: int, length: int) -> int:
        assert self.batch is not None
        cost = length if self.length is None else length * length
        batch = min(batch, self.batch.max, max(1, self.budget // max(1, cost)))
        return max(batch, self.batch.min)

    def _at_least(self, rows: list[Row]) -> list[Row]:
        """As many rows as the batch axis takes: the first repeated where there are too few, the rest left out."""
        assert self.batch is not None
        rows = rows[: self.batch.max]
        return rows + [rows[0]] * (self.batch.min - len(rows))

    def _row_of(self, length: int) -> Row:
        """A row of exactly `length`: real samples one after the other, cut at the end."""
        assert self.length is not None
        parts: list[Row] = []
        total = 0
        while total < length:
            parts.append(self.samples[int(self.rng.integers(len(self.samples)))])
            total += max(1, self._length_of(parts[-1]))
        row: dict[str, Array] = {}
        for spec in self.specs:
            if self.length.name not in spec.shape:
                row[spec.name] = parts[0][spec.name]
                continue
            dim = spec.shape.index(self.length.name)
            joined = np.concatenate([part[spec.name] for part in parts], axis=dim)
            row[spec.name] = np.take(joined, np.arange(length), axis=dim)
        return row

    def _same_shape(self, count: int, like: Row | None = None) -> list[Row]:
        """`count` rows of one shape, real ones in turn."""
        like = self.samples[0] if like is None else like
        shapes = {spec.name: like[spec.name].shape for spec in self.specs}
        fitting = [row for row in self.samples if all(row[name].shape == shape for name, shape in shapes.items())]
        return [fitting[i % len(fitting)] for i in range(count)]

    def _stack(self, rows: Sequence[Row], *, left: bool = False, width: int = 0) -> dict[str, Array]:
        """One batch, padded to its longest row or to `width`."""
        if self.length is not None:
            width = max(width, self.length.min if self.mask else 0, *(self._length_of(row) for row in rows))
        inputs: dict[str, Array] = {}
        for spec in self.specs:
            arrays = [self._padded(row[spec.name], spec, width, left) for row in rows]
            axis = spec.shape.index("batch") if "batch" in spec.shape else None
            inputs[spec.name] = arrays[0] if axis is None else np.concatenate(arrays, axis=axis)
        return inputs

    def _padded(self, array: Array, spec: TensorSpec, width: int, left: bool) -> Array:
        if self.length is None or self.length.name not in spec.shape:
            return array
        dim = spec.shape.index(self.length.name)
        missing = width - array.shape[dim]
        amounts = [(0, 0)] * array.ndim
        amounts[dim] = (missing, 0) if left else (0, missing)
        return np.pad(array, amounts, constant_values=self.pad.get(spec.name, 0))


def _checked(sample: Row, specs: tuple[TensorSpec, ...]) -> Row:
    for spec in specs:
        if spec.name not in sample:
            raise RequestError("a sample lacks an input", spec.name, f"It has: {', '.join(sample)}")
        shape = np.shape(sample[spec.name])
        if len(shape) != len(spec.shape) or ("batch" in spec.shape and shape[spec.shape.index("batch")] != 1):
            raise RequestError(f"a sample's {spec.name!r} is not a batch of one", shape, f"It must be {spec.shape}")
    return {spec.name: np.asarray(sample[spec.name]) for spec in specs}


def _distinct(cases: list[Case]) -> list[Case]:
    """The cases without those whose name came before (operating points often repeat a corner)."""
    seen: dict[str, Case] = {}
    for case in cases:
        seen.setdefault(case.name, case)
    return list(seen.values())
