"""What was measured of a float tensor over data, as the precision rules read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from exporter.errors import RequestError

FP16_SMALLEST_NORMAL = 2.0**-14
"""Below it FP16 has fewer than 11 bits, and some runtimes take such numbers for zero."""
FP16_FLUSHED = 2.0**-25
"""Numbers up to it become zero in FP16 (half the smallest subnormal one, which ties to even)."""
MARGIN = 4.0
"""Measured magnitudes are multiplied by it before they are compared with a half type's largest number.

Two bits of headroom: data that were not seen may reach four times as far, or twice where squares of them are compared.
All 295 of the built-in sentences reach up to 1.27 times as far as 64 of them do, tensor by tensor, in MiniLM."""


@dataclass(frozen=True)
class Range:
    """A float tensor over data.

    Attributes:
        low: Smallest value; infinite or NaN where a value was.
        high: Largest value; likewise.
        subnormal: Share of the non-zero values below FP16's normal range, those that become zero included.
        flushed: Share of the non-zero values that become zero in FP16.
        subnormal_weight: Share of the sum of magnitudes that lies in values below FP16's normal range.
        shape: The largest size seen along each axis; ``None``: not told.
    """

    low: float
    high: float
    subnormal: float = 0.0
    flushed: float = 0.0
    subnormal_weight: float = 0.0
    shape: tuple[int, ...] | None = None

    @property
    def largest(self) -> float:
        """Largest magnitude; NaN where a value was NaN."""
        return abs(self.low) if self.low != self.low else max(abs(self.high), abs(self.low))

    def to_dict(self) -> dict[str, Any]:
        """As JSON; infinities and NaN as text, which JSON has no numbers for."""
        shown = asdict(self)
        for side in ("low", "high"):
            shown[side] = jsonable(shown[side])
        return shown

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Range:
        """What `to_dict` gave.

        Raises:
            RequestError: It is damaged.
        """
        try:
            shape = data["shape"]
            return cls(
                float(data["low"]),
                float(data["high"]),
                float(data["subnormal"]),
                float(data["flushed"]),
                float(data["subnormal_weight"]),
                None if shape is None else tuple(int(size) for size in shape),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise RequestError("a measured range is damaged", repr(error), "Measure again") from error


def jsonable(value: float) -> float | str:
    """A number, or its name where strict JSON has none for it."""
    return value if abs(value) < float("inf") else str(value)
