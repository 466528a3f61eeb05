"""The table in the terminal that ends a run: the variants that ran, what did not and why, and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.compression_table import compression_lines, models_table
from pipelines.report import formats
from pipelines.report.variant import OVERALL, Speed, VariantView
from pipelines.report.view import ReportView
from pipelines.writable import writable

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {"passed": "green", "inconclusive": "yellow", "failed": "red", "skipped": "dim"}
_LONGEST_REASON = 400
_GAP = 2
"""Spaces between two columns: the box's own and one of padding."""


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        title: Its heading.
        cell: What it shows of a variant.
        rank: Columns of the highest rank are dropped first where the terminal is too narrow; 0 always stays.
    """

    title: str
    cell: Callable[[VariantView], str]
    rank: int


def render_table(report: Mapping[str, Any], console: Console) -> None:
    """Print the result of a run.

    Args:
        report: The document of ``report.json``; any part may be missing. Its texts are printed as they are (they are
            no console markup).
        console: A `rich.console.Console`. Where it is narrow, the less important columns are left out; the report
            has all of them.
    """
    from rich.text import Text

    view = ReportView(report)

    def line(*parts: tuple[str, str]) -> None:
        console.print(Text.assemble(*((writable(text, console), style) for text, style in parts)), highlight=False)

    if view.tried:
        console.print(variants_table(view, console))
    for text, style in legend(view):
        line((text, style))
    _explain(view, line)
    if view.compression is not None:
        console.print()
        console.print(models_table(view.compression, console))
        for text, style in compression_lines(view.compression):
            line((text, style))
    if view.ok:
        line((view.sentence, "bold green"))
    else:
        told = view.sentence.lower().startswith("do not ship")
        line(("" if told else "Do not ship: ", "bold red"), (view.sentence, "bold red" if told else "bold"))
    if view.closest is not None:
        line(("Closest: ", ""), (view.closest.id, "bold"), (f" ({view.closest.status})", ""))


def legend(view: ReportView) -> list[tuple[str, str]]:
    """What the figures of the table mean, as lines and their styles."""
    if not view.timed:
        return []
    chosen = "* marks what was selected: the fastest, or a simpler variant that is as fast."
    lines = [(f"Speed-ups over {view.reference_label}; {chosen}", "dim")]
    if view.busy_share:
        lines.append((f"They cannot be relied on: {view.busy_note}.", "yellow"))
    return lines


def skipped_lines(view: ReportView) -> list[str]:
    """What was skipped, a line for each reason."""
    return [
        f"{', '.join(v.id for v in variants)}: {formats.short(reason or 'no reason given', _LONGEST_REASON)}"
        for reason, variants in view.skipped
    ]


def variants_table(view: ReportView, console: Console) -> Any:
    """The variants that ran and the baselines, as a table of rich that fits the console."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    ran = [v for v in view.variants if v.status != "skipped"]
    columns, room = _fitting(_columns(view), ran, console.width)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    table.add_column("Variant", overflow="fold")
    for column in columns:
        table.add_column(Text(writable(column.title, console)), justify="right", no_wrap=True)
    table.add_column("Status", no_wrap=True)
    for variant in ran:
        style = "bold" if variant.overall_winner else ""
        cells = [Text(writable(column.cell(variant), console), style=style) for column in columns]
        name = Text("\n".join(writable(part, console) for part in _broken(variant.id, room)), style=style)
        table.add_row(name, *cells, Text(variant.status, style=_STYLES[variant.status]))
    for label, data in view.rivals:
        speeds = {name: Speed.read(formats.mapping(data, "points", name), "speedup").value for name in view.points}
        if any(value is not None for value in speeds.values()):
            texts = [formats.ratio(speeds[c.title]) if c.title in speeds else "" for c in columns]
            table.add_row(label, *(Text(writable(t, console)) for t in texts), "baseline", style="dim")
    return table


def _columns(view: ReportView) -> list[Column]:
    def speed(name: str) -> Callable[[VariantView], str]:
        def cell(variant: VariantView) -> str:
            text = formats.ratio(variant.speed(name).value)
            return f"{text}*" if name in variant.selected_for else text

        return cell

    def overall(variant: VariantView) -> str:
        text = formats.ratio(variant.overall)
        return f"{text}*" if OVERALL in variant.selected_for else text

    def parity(variant: VariantView) -> str:
        return formats.scientific(variant.decisive_error)

    def quality(variant: VariantView) -> str:
        if variant.has_interval:
            return formats.signed(variant.quality.get("difference"))
        return variant.quality_verdict if variant.quality else formats.NOTHING

    shown = [name for name in view.points if any(v.speed(name).value is not None for v in view.variants)]
    # The first four operating points outlast the gates' figures: the status has the gates' verdict already.
    columns = [Column(name, speed(name), i if i <= 4 else 8 + i) for i, name in enumerate(shown, start=1)]
    if shown:
        columns.append(Column("Overall", overall, 0))
    columns.append(Column("RMS error", parity, 8))
    if any(v.quality for v in view.variants):
        columns.append(Column("Quality", quality, 7))
    columns.append(Column("Size", lambda v: formats.size(v.bytes), 6))
    return columns


def _fitting(columns: list[Column], variants: list[VariantView], width: int) -> tuple[list[Column], int]:
    """The columns that fit beside the variants' ids, and the room left for the ids (which may break over lines)."""
    kept = list(columns)
    longest = max(len("torch.compile"), *(len(v.id) for v in variants))
    status = max(len("baseline"), *(len(v.status) for v in variants))

    def room() -> int:
        widths = [max([len(c.title), *(len(c.cell(v)) for v in variants)]) + _GAP for c in kept]
        return width - sum(widths) - status - _GAP

    while room() < min(22, longest) and any(column.rank for column in kept):
        kept.remove(max(reversed(kept), key=lambda column: column.rank))
    return kept, max(8, room())


def _broken(id_: str, room: int) -> list[str]:
    """An id in lines of at most `room` characters, broken after a hyphen where there is one."""
    lines = []
    while len(id_) > room:
        cut = id_.rfind("-", 1, room) + 1 or room
        lines.append(id_[:cut])
        id_ = id_[cut:]
    return [*lines, id_]


def _explain(view: ReportView, line: Callable[..., None]) -> None:
    """Reasons of what did not pass, then what was skipped, grouped by reason."""
    for variant in view.variants:
        if variant.status in ("failed", "inconclusive") and variant.reason:
            style = _STYLES[variant.status]
            line(
                (variant.status, style), (f"  {variant.id}: ", ""), (formats.short(variant.reason, _LONGEST_REASON), "")
            )
    for text in skipped_lines(view):
        line(("skipped", "dim"), (f"  {text}", "dim"))
    if view.dropped_points:
        line((formats.short(view.dropped_points, _LONGEST_REASON), "yellow"))
    if view.built_in_data:
        line((f"Built-in data were used for {view.built_in_data}.", "dim"))
