"""The original: the source run by its own framework in FP32, against which everything is measured."""

from __future__ import annotations

from exporter.original.base import Original
from exporter.original.open import open_original

__all__ = ["Original", "open_original"]
