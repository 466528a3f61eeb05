"""The original: the source run by its own framework in FP32, against which everything is measured."""

from __future__ import annotations

from exporter.original.base import Original
from exporter.original.open import open_original
from exporter.original.plain import open_described, original_arguments

__all__ = ["Original", "open_described", "open_original", "original_arguments"]
