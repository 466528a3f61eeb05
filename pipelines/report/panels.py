"""The charts of the report, each made of rows: speed-up, parity, quality, sizes and the time line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from pipelines import baselines
from pipelines.report import charts
from pipelines.report.formats import (
    decade,
    dig,
    duration,
    interval,
    listing,
    mapping,
    number,
    percent,
    point,
    ratio,
    scientific,
    shown,
    signed,
    significant,
    size,
    words,
)
from pipelines.report.variant import Speed, VariantView
from pipelines.report.view import ReportView

MOST_LAYERS = 12
"""Layers that a chart of sensitivity shows; ``evidence/precision.json`` has all."""
MOST_ROWS = 8
"""Variants that a chart of speed-ups shows per operating point; the tables have all."""


@dataclass(frozen=True)
class Row:
    """One row of a chart.

    Attributes:
        label: What the row is about, usually a variant's id.
        plot: The SVG.
        value: The main figure as text.
        detail: A second line beneath it.
        tone: ``"chosen"`` (selected), ``"plain"``, ``"baseline"``, or a status that is not passed.
    """

    label: str
    plot: Markup
    value: str
    detail: str = ""
    tone: str = "plain"


@dataclass(frozen=True)
class Panel:
    """Rows that share one horizontal scale, with the axis below them."""

    rows: list[Row]
    title: str = ""
    axis: Markup = field(default_factory=Markup)
    axis_title: str = ""
    note: str = ""


def speed_scale(view: ReportView) -> charts.Scale:
    """One scale for all operating points, so that panels can be compared."""
    values: list[float] = []
    for name in view.points:
        for _, data in view.rivals:
            values += Speed.read(mapping(data, "points", name), "speedup").known
        for variant in view.timed:
            values += variant.speed(name).known + variant.speed_vs_best(name).known
    return charts.ratio_scale(values)


def speed_panels(view: ReportView) -> list[Panel]:
    """Per operating point the speed-ups, fastest first; a diamond for those over the best PyTorch."""
    scale = speed_scale(view)
    panels = []
    for name in view.points:
        rows: list[tuple[float, Row]] = []
        for variant in view.timed:
            speed = variant.speed(name)
            if speed.value is not None:
                tone = _tone(variant, chosen=name in variant.selected_for)
                rows.append(
                    (speed.value, _speed_row(view, scale, variant.id, speed, variant.speed_vs_best(name), tone))
                )
        for rival, data in view.rivals if rows else ():
            speed = Speed.read(mapping(data, "points", name), "speedup")
            if speed.value is not None:
                rows.append((speed.value, _speed_row(view, scale, rival, speed, Speed(), "baseline")))
        if rows:
            ordered = [row for _, row in sorted(rows, key=lambda item: -item[0])]
            kept = [row for i, row in enumerate(ordered) if i < MOST_ROWS or row.tone in ("chosen", "baseline")]
            left = len(ordered) - len(kept)
            note = f"{left} slower variants are in the table of latencies." if left else ""
            panels.append(Panel(kept, point(name), charts.axis(scale, lambda v: f"{v:g}×"), note=note))
    return panels


def _speed_row(view: ReportView, scale: charts.Scale, label: str, first: Speed, best: Speed, tone: str) -> Row:
    marks = [charts.grid(scale), charts.rule(scale, 1.0, "reference")]
    title = f"{label}: {_speed_text(first)} the speed of {view.reference_label}"
    if best.value is not None:
        if best.low is not None and best.high is not None:
            marks.append(charts.whisker(scale, best.low, best.high, 27, "second"))
        marks.append(charts.diamond(scale, best.value, 27, "second"))
        title += f"; {_speed_text(best)} the best PyTorch baseline"
    height, y = (38, 12.0) if best.value is not None else (38, 19.0)
    if first.low is not None and first.high is not None:
        marks.append(charts.whisker(scale, first.low, first.high, y, f"first {tone}"))
    if first.value is not None:
        marks.append(charts.dot(scale, first.value, y, f"first {tone}"))
    return Row(label, charts.plot(marks, title, height), _speed_text(first), _speed_text(best), tone)


def _speed_text(speed: Speed) -> str:
    if speed.value is None:
        return ""
    ends = interval(speed.low, speed.high)
    return f"{ratio(speed.value)} ({ends})" if ends else ratio(speed.value)


def parity_panel(view: ReportView) -> Panel | None:
    """Every variant's error on a logarithmic scale, with its own noise floor and limit."""
    measured = [v for v in view.variants if v.decisive_error is not None]
    if not measured:
        return None
    values: list[float] = []
    for variant in measured:
        values += [variant.decisive_error or 0.0, number(variant.parity.get("floor")) or 0.0]
        values.append(number(variant.parity.get("limit")) or 0.0)
    scale = charts.decade_scale(values)
    rows = [_parity_row(scale, variant) for variant in measured]
    return Panel(rows, axis=charts.axis(scale, decade), axis_title="RMS relative error to the original, log scale")


def _parity_row(scale: charts.Scale, variant: VariantView) -> Row:
    floor, limit = number(variant.parity.get("floor")), number(variant.parity.get("limit"))
    error = variant.decisive_error or 0.0
    marks: list[Markup] = []
    if floor:
        marks.append(charts.band(scale, None, floor, "noise"))
    if limit:
        marks.append(charts.band(scale, limit, None, "beyond"))
    marks.append(charts.grid(scale))
    if floor:
        marks.append(charts.rule(scale, floor, "floor"))
    if limit:
        marks.append(charts.rule(scale, limit, "limit"))
    tone = _gate_tone(variant, variant.parity_verdict)
    marks.append(charts.dot(scale, error, 19, f"first {tone}"))
    share = variant.limit_share
    parts = [f"{variant.id}: error {scientific(error)}"]
    parts += [f"noise floor {scientific(floor)}"] if floor else []
    parts += [f"limit {scientific(limit)}"] if limit else ["no limit: quality is the judge"]
    if share is None:
        detail = "" if limit else "judged by quality"
    else:
        detail = f"{percent(share, 2)} of the limit" if share <= 1 else f"{significant(share, 2)} × the limit"
    return Row(variant.id, charts.plot(marks, ", ".join(parts), 38), scientific(error), detail, tone)


def quality_panels(view: ReportView) -> list[Panel]:
    """Per metric: the difference to the original with its interval, and the budget's two lines."""
    metrics: dict[str, list[VariantView]] = {}
    for variant in view.variants:
        if variant.has_interval:
            metrics.setdefault(str(variant.quality.get("metric") or "metric"), []).append(variant)
    return [_quality_panel(metric, variants) for metric, variants in metrics.items()]


def _quality_panel(metric: str, variants: Sequence[VariantView]) -> Panel:
    values: list[float] = []
    for variant in variants:
        figures = [number(variant.quality.get(key)) for key in ("difference", "low", "high")]
        budget = [number(variant.quality.get(key)) for key in ("max_drop", "max_drop_worst")]
        values += [v for v in figures if v is not None] + [-v for v in budget if v is not None]
    scale = charts.linear_scale(values)
    rows = [_quality_row(scale, metric, variant) for variant in variants]
    title = "difference to the original in points (hundredths)"
    name = words(metric)
    digits = 1 if scale.high - scale.low > 1 else 2
    return Panel(
        rows,
        name[:1].upper() + name[1:],
        charts.axis(scale, lambda v: signed(v, digits)),
        title,
    )


def _quality_row(scale: charts.Scale, metric: str, variant: VariantView) -> Row:
    q = variant.quality
    difference, low, high = (number(q.get(key)) for key in ("difference", "low", "high"))
    drop, worst = number(q.get("max_drop")), number(q.get("max_drop_worst"))
    marks = []
    if worst is not None:
        marks.append(charts.band(scale, None, -worst, "beyond"))
    marks += [charts.grid(scale), charts.rule(scale, 0.0, "reference")]
    if drop is not None:
        marks.append(charts.rule(scale, -drop, "limit"))
    if worst is not None:
        marks.append(charts.rule(scale, -worst, "limit worst"))
    tone = _gate_tone(variant, variant.quality_verdict)
    ends = f"{signed(low)} to {signed(high)}" if low is not None and high is not None else ""
    if low is not None and high is not None:
        marks.append(charts.whisker(scale, low, high, 19, f"first {tone}"))
    if difference is not None:
        marks.append(charts.dot(scale, difference, 19, f"first {tone}"))
    title = f"{variant.id}: {metric} {signed(difference)} points"
    title += f", interval {ends}" if ends else ""
    title += f"; budget −{shown(drop)}" if drop is not None else ""
    return Row(variant.id, charts.plot(marks, title, 38), signed(difference), ends, tone)


def file_panel(view: ReportView) -> Panel | None:
    """Bytes on disk per variant, the source's weights first."""
    weights = number(dig(view.data, "source", "weights_bytes"))
    rows = [(v.id, v.bytes, _bar_tone(v)) for v in view.variants if v.bytes]
    return _bars([("source weights", weights, "baseline"), *rows]) if rows else None


def memory_panel(view: ReportView) -> Panel | None:
    """Peak resident memory per worker process, the baselines first."""
    rows = [(v.id, v.peak_rss_bytes, _bar_tone(v)) for v in view.variants if v.peak_rss_bytes]
    if not rows:
        return None
    first = [
        (baselines.label(name), number(data.get("peak_rss_bytes")), "baseline") for name, data in view.baselines.items()
    ]
    return _bars([*first, *rows])


def _bars(items: Iterable[tuple[str, float | None, str]]) -> Panel:
    known = [(label, value, tone) for label, value, tone in items if value]
    scale = charts.size_scale(value for _, value, _ in known)
    rows = []
    for label, value, tone in known:
        marks = [charts.bar(scale, value, 5, 12, f"bar {tone}")]
        rows.append(Row(label, charts.plot(marks, f"{label}: {size(value)}", 22), size(value), "", tone))
    return Panel(rows)


def timeline_panel(view: ReportView) -> Panel | None:
    """When each stage began and how long it took."""
    stages = [stage for stage in view.items("timeline") if number(dig(stage, "seconds")) is not None]
    if not stages:
        return None
    # What came from the cache took no time in this run.
    began = [number(dig(stage, "start_s")) or 0.0 for stage in stages]
    took = [0.0 if dig(stage, "cached") else number(stage["seconds"]) or 0.0 for stage in stages]
    scale = charts.size_scale(start + seconds for start, seconds in zip(began, took, strict=True))
    rows = []
    for stage, start, spent in zip(stages, began, took, strict=True):
        name, seconds, cached = str(dig(stage, "stage")), number(stage["seconds"]) or 0.0, bool(dig(stage, "cached"))
        tone = "baseline" if cached else "plain"
        text = f"{duration(seconds)}{', from the cache' if cached else ''}"
        marks = [charts.span(scale, start, start + spent, 5, 12, f"bar {tone}")]
        value = "cached" if cached else duration(seconds)
        rows.append(Row(name, charts.plot(marks, f"{name}: {text}", 22), value, "", tone))
    return Panel(rows)


def sensitivity_panels(view: ReportView) -> list[Panel]:
    """Per searched variant the layers that cost most, and what the search came to."""
    found = []
    for name, record in view.part("precision").items():
        layers = [layer for layer in listing(record, "search", "layers") if number(dig(layer, "error")) is not None]
        if not layers:
            continue
        scale = charts.size_scale(number(dig(layer, "error")) or 0.0 for layer in layers)
        # What is kept comes first, and the costliest of the others after it.
        kept = [layer for layer in layers if dig(layer, "kept")]
        others = [layer for layer in layers if not dig(layer, "kept")]
        rows = [_layer_row(layer, scale) for layer in [*kept, *others][:MOST_LAYERS]]
        found.append(Panel(rows, shown(name), note=_search_note(mapping(record, "search"), len(layers), len(kept))))
    return found


def _layer_row(layer: Mapping[str, Any], scale: charts.Scale) -> Row:
    name, error = shown(dig(layer, "node")), number(dig(layer, "error")) or 0.0
    kept, together, gained = bool(dig(layer, "kept")), number(dig(layer, "quantized_together")), dig(layer, "gained_ms")
    detail = "" if number(gained) is None else f"{significant(gained, 2)} ms"
    value = f"{'≈ ' if together is not None and together > 1 else ''}{significant(error, 2)}"
    text = f"output error {significant(error, 2)}{', kept in FP32' if kept else ''}"
    marks = [charts.bar(scale, error, 5, 12, f"bar {'chosen' if kept else 'plain'}")]
    return Row(name, charts.plot(marks, f"{name}: {text}", 22), value, detail, "chosen" if kept else "plain")


def _search_note(search: Mapping[str, Any], layers: int, kept: int) -> str:
    steps, runs = listing(search, "steps"), number(dig(search, "runs"))
    first = number(dig(steps[0], "drop")) if steps else None
    before = "" if first is None else f" All quantized it was {significant(first)} behind."
    tried = "" if runs is None else f" {runs:g} forms were made and run."
    if not dig(search, "passed"):
        closest = min((number(dig(step, "drop")) or 0.0 for step in steps), default=None)
        told = "" if closest is None else f": the closest form is {significant(closest)} behind"
        return f"No choice of layers passes the quality gate{told}.{before}{tried}"
    return f"The quality gate passes with {kept} of {layers} layers in FP32.{before}{tried}"


def _tone(variant: VariantView, chosen: bool) -> str:
    if variant.status != "passed":
        return variant.status
    return "chosen" if chosen else "plain"


def _gate_tone(variant: VariantView, verdict: str) -> str:
    """In a gate's chart the colour is that gate's verdict, which may be better than the variant's status."""
    if verdict in ("failed", "inconclusive"):
        return verdict
    return _bar_tone(variant)


def _bar_tone(variant: VariantView) -> str:
    return "chosen" if variant.overall_winner else "plain"
