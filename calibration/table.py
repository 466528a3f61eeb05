"""The calibration table: what was seen of every observed tensor, as plain data that any target's quantizer reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from calibration.observers import Histogram
from exporter.errors import RequestError

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class TensorStatistics:
    """What was seen of one tensor.

    Attributes:
        channel_min: Smallest value per channel (the last axis), float32 (channels,).
        channel_max: Largest value per channel, float32 (channels,).
        channel_mean: Mean per channel, float64 (channels,): the sums of the batches are added in their order.
        count: Values seen per channel.
        histogram: Of all values, over the range of the range pass; ``None`` where only ranges were taken.
    """

    channel_min: np.ndarray
    channel_max: np.ndarray
    channel_mean: np.ndarray
    count: int
    histogram: Histogram | None = None

    @property
    def min(self) -> float:
        return float(self.channel_min.min())

    @property
    def max(self) -> float:
        return float(self.channel_max.max())

    @property
    def channel_absmax(self) -> np.ndarray:
        """Largest absolute value per channel, float32 (channels,)."""
        return np.maximum(np.abs(self.channel_min), np.abs(self.channel_max))

    @property
    def constant(self) -> bool:
        """The tensor never changed: no range can be learned from it."""
        return bool(np.all(self.channel_min == self.channel_max)) and self.min == self.max


@dataclass(frozen=True)
class CalibrationTable:
    """Statistics by the tensor's name in the FP32 graph, and where they come from.

    Attributes:
        tensors: By name.
        samples: Rows seen.
        batches: Batches seen.
        origin: Of the data, for people.
        digest: SHA-256 of the rows, for machines.
    """

    tensors: Mapping[str, TensorStatistics]
    samples: int
    batches: int
    origin: str = ""
    digest: str = ""
    notes: tuple[str, ...] = field(default=())

    def of(self, tensor: str) -> TensorStatistics:
        """Statistics of one tensor.

        Raises:
            RequestError: It was not observed.
        """
        if tensor not in self.tensors:
            raise RequestError("the calibration table has no such tensor", tensor, "Calibrate this graph again")
        return self.tensors[tensor]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "schema_version": SCHEMA_VERSION,
            "samples": self.samples,
            "batches": self.batches,
            "origin": self.origin,
            "digest": self.digest,
            "notes": list(self.notes),
            "tensors": {name: _tensor_dict(stats) for name, stats in self.tensors.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CalibrationTable:
        """What `to_dict` gave.

        Raises:
            RequestError: It is of another schema, or damaged.
        """
        if data.get("schema_version") != SCHEMA_VERSION:
            raise RequestError(
                "the calibration table is of another version", data.get("schema_version"), "Calibrate again"
            )
        try:
            tensors = {name: _tensor(entry) for name, entry in data["tensors"].items()}
            return cls(
                tensors,
                int(data["samples"]),
                int(data["batches"]),
                str(data["origin"]),
                str(data["digest"]),
                tuple(data["notes"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise RequestError("the calibration table is damaged", repr(error), "Calibrate again") from error

    def save(self, path: Path) -> None:
        """Write it as JSON; equal tables give equal bytes."""
        path.write_text(json.dumps(self.to_dict(), sort_keys=True) + "\n", encoding="utf-8")


def load_table(path: Path) -> CalibrationTable:
    """Read what `CalibrationTable.save` wrote.

    Raises:
        RequestError: The file is missing or holds no calibration table.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError("the calibration table cannot be read", path, "Calibrate again") from error
    if not isinstance(data, dict):
        raise RequestError("the file holds no calibration table", path, "Calibrate again")
    return CalibrationTable.from_dict(data)


def _tensor_dict(stats: TensorStatistics) -> dict[str, Any]:
    histogram = stats.histogram
    return {
        "channel_min": stats.channel_min.tolist(),
        "channel_max": stats.channel_max.tolist(),
        "channel_mean": stats.channel_mean.tolist(),
        "count": stats.count,
        "histogram": None
        if histogram is None
        else {"low": histogram.low, "high": histogram.high, "counts": histogram.counts.tolist()},
    }


def _tensor(entry: Mapping[str, Any]) -> TensorStatistics:
    histogram = entry["histogram"]
    return TensorStatistics(
        np.asarray(entry["channel_min"], np.float32),
        np.asarray(entry["channel_max"], np.float32),
        np.asarray(entry["channel_mean"], np.float64),
        int(entry["count"]),
        histogram
        and Histogram(float(histogram["low"]), float(histogram["high"]), np.asarray(histogram["counts"], np.int64)),
    )
