"""The second table in the terminal, where the recipe compresses: every model on the way, beside the teacher."""

from __future__ import annotations

from itertools import compress
from typing import TYPE_CHECKING, Any

from pipelines.baselines import label
from pipelines.report import formats
from pipelines.report.beside import Beside, Model
from pipelines.report.compression import TEACHER, CompressionView
from pipelines.writable import writable

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {"passed": "green", "inconclusive": "yellow", "failed": "red", "skipped": "yellow"}
_POINTS = 2
_NARROW, _WIDE = 64, 96
"""Below so many columns what the least is needed for is left out."""


def models_table(view: CompressionView, console: Console) -> Any:
    """The models and the selected variants, as a table of rich; narrow terminals get fewer columns."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    points = _points(view)[: 0 if console.width < _NARROW else 1 if console.width < _WIDE else _POINTS]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    table.add_column("Model", overflow="fold")
    metric = _metric(view)
    wanted = [bool(metric) and console.width >= _NARROW, True, True, *(True for _ in points)]
    titles = [metric, "vs. teacher" if metric else "Agreement", "Size", *points]
    for title in compress(titles, wanted):
        table.add_column(Text(writable(title, console)), justify="right", no_wrap=True)
    for model in (*view.hops, *view.selected):
        cells = [_value(model.quality), _lost(model, console.width >= _WIDE), _size(view, model)]
        cells += [formats.ratio(_speed(view, model, name)) for name in points]
        name = f"{model.name}  {model.title}" if model.title and console.width >= _NARROW else model.name
        style = "dim" if model.is_teacher else "bold" if model is view.overall else ""
        table.add_row(*(Text(writable(text, console), style=style) for text in (name, *compress(cells, wanted))))
    return table


def compression_lines(view: CompressionView) -> list[tuple[str, str]]:
    """What the figures mean, and whether the budget was kept, as lines and their styles."""
    told = ["Points of the metric against the teacher" if _metric(view) else "Agreement with the teacher"]
    told.append("sizes in percent of the teacher's")
    if view.point is not None:
        told.append(f"speeds are times {TEACHER}, models timed on {label(view.runner)}")
    lines = [(f"{'; '.join(told)}.", "dim")]
    if view.busy:
        busy = f"These speeds cannot be relied on: other programs took {view.busy:.0%} of the processors meanwhile."
        lines.append((busy, "yellow"))
    for model in view.over_budget:
        difference = formats.signed(model.quality.difference)
        lines.append((f"{model.name} loses {difference} points with conversion: more than the budget.", "yellow"))
    lines.append((f"{formats.short(view.gate_sentence, 400)}.", _STYLES[view.verdict]))
    return lines


def _points(view: CompressionView) -> list[str]:
    """The point that is told of first, and the one that differs most from it: the last."""
    if view.point is None:
        return []
    return list(dict.fromkeys([view.point, view.points[-1]]))


def _metric(view: CompressionView) -> str:
    """The metric's name; empty where there are no labels to tell."""
    names = (model.quality.metric for model in view.hops if model.quality.difference is not None)
    name = next(names, "")
    return name[:1].upper() + name[1:]


def _value(quality: Beside) -> str:
    return formats.score(quality.value)


def _lost(model: Model, wide: bool) -> str:
    quality = model.quality
    if model.is_teacher:
        return "teacher"
    if quality.difference is None:
        return formats.score(quality.agreement)
    return quality.loss if wide else formats.signed(quality.difference)


def _size(view: CompressionView, model: Model) -> str:
    share = view.share(model, "bytes")
    told = formats.size(model.bytes)
    return told if share is None or model.is_teacher else f"{told} ({formats.percent(share, 2)})"


def _speed(view: CompressionView, model: Model, name: str) -> float | None:
    return model.speed(model.name if model in view.selected else view.runner, name).value
