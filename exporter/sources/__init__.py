"""Where a model comes from: folders, hub ids, packages, factories, exported programs and ONNX files."""

from __future__ import annotations

from exporter.sources.resolve import resolve_source
from exporter.sources.source import KINDS, Source

__all__ = ["KINDS", "Source", "resolve_source"]
