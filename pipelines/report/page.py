"""From the report document to `report.html` and `report.json`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.report import formats

if TYPE_CHECKING:
    from jinja2 import Environment

HTML_NAME = "report.html"
JSON_NAME = "report.json"
_HERE = Path(__file__).parent


def render_html(report: Mapping[str, Any]) -> str:
    """The report as one self-contained page: inline CSS and SVG, no script, nothing loaded from anywhere.

    Args:
        report: The document that `write_report` writes as ``report.json``. Any part may be missing or null. Every
            text in it is treated as untrusted and escaped.

    Returns:
        The HTML. The same document gives the same text.
    """
    from pipelines.report import panels
    from pipelines.report.view import ReportView

    view = ReportView(_plain(report))
    return (
        _environment()
        .get_template("report.html")
        .render(
            view=view,
            speed_panels=panels.speed_panels(view),
            parity_panel=panels.parity_panel(view),
            quality_panels=panels.quality_panels(view),
            file_panel=panels.file_panel(view),
            memory_panel=panels.memory_panel(view),
            timeline_panel=panels.timeline_panel(view),
            f=formats,
        )
    )


def write_report(report: Mapping[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.json`` into `folder`, each in one step.

    Returns:
        The two paths. ``report.json`` is strict JSON: NaN and infinities (which a broken variant can yield, and which
        the parity gate counts) are written as null.
    """
    folder.mkdir(parents=True, exist_ok=True)
    document = json.dumps(_plain(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    page = render_html(report)
    return _write(folder / HTML_NAME, page), _write(folder / JSON_NAME, document)


def _write(path: Path, text: str) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # A text may hold a lone surrogate (a broken file name): it is replaced, because UTF-8 has no form for it.
        temporary.write_bytes(text.encode("utf-8", errors="replace"))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _plain(value: Any) -> Any:
    """`value` with what JSON knows only: NumPy scalars as numbers, paths as texts, NaN and infinities as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "item"):
        return _plain(value.item())
    return str(value)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        ratio=formats.ratio,
        size=formats.size,
        ms=formats.milliseconds,
        sci=formats.scientific,
        point=formats.point,
    )
    return environment
