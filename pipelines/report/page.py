"""From the report document to `report.html` and `report.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.report import formats

if TYPE_CHECKING:
    from jinja2 import Environment

_HERE = Path(__file__).parent


def render_html(report: Mapping[str, Any]) -> str:
    """The report as one self-contained page: inline CSS and SVG, no script, nothing loaded from anywhere.

    Args:
        report: The document that `render_json` writes as ``report.json``. Any part may be missing or null. Every
            text in it is treated as untrusted and escaped.

    Returns:
        The HTML. The same document gives the same text.
    """
    from pipelines.report import panels
    from pipelines.report.compression_charts import trade_panels
    from pipelines.report.compression_steps import step_views
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
            sensitivity_panels=panels.sensitivity_panels(view),
            trade_panels=trade_panels(view.compression) if view.compression else [],
            step_views=step_views(view.compression) if view.compression else [],
            timeline_panel=panels.timeline_panel(view),
            f=formats,
        )
    )


def render_json(report: Mapping[str, Any]) -> bytes:
    """The report for machines: strict JSON in UTF-8.

    NaN and infinities (which a broken variant can yield, and which the parity gate counts) are written as null, and
    what UTF-8 has no form for (half of a pair, in a broken file name) as a question mark.
    """
    text = json.dumps(_plain(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", errors="replace")


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
