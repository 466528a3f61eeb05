"""Small charts as inline SVG: scales, marks and plots. They know nothing of models or reports.

A plot is one row high and as wide as its place: every horizontal position is a percentage, so the same SVG serves a
wide screen and a phone with text at its natural size, without a script. Colours come from CSS classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape


@dataclass(frozen=True)
class Scale:
    """Maps values to horizontal positions.

    Attributes:
        low: Value at 0 %.
        high: Value at 100 %.
        log: Logarithmic (both ends positive) instead of linear.
        ticks: Values that the axis names.
    """

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """The position of `value` in percent; beyond an end it is that end."""
        if self.log:
            if value <= 0:
                return 0.0
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return 100.0 * min(1.0, max(0.0, share))


def ratio_scale(values: Iterable[float]) -> Scale:
    """A logarithmic scale for ratios around 1, with ticks at round ratios and at least the range 0.8 to 1.25.

    What lies beyond 0.001 or a million is drawn at the end.
    """
    known = [v for v in values if v > 0]
    low, high = max(1e-3, min([*known, 0.8])), min(1e6, max([*known, 1.25]))
    margin = (high / low) ** 0.04
    low, high = low / margin, high * margin
    return Scale(low, high, True, _thin(_ratio_ticks(low, high), keep=1.0, most=6))


def decade_scale(values: Iterable[float]) -> Scale:
    """A logarithmic scale over whole decades that hold the positive `values`, at least two of them.

    What lies beyond 1e-20 or 1e20 is drawn at the end.
    """
    known = [min(1e20, max(1e-20, v)) for v in values if v > 0] or [1e-7]
    first = math.floor(math.log10(min(known)) - 0.05)
    last = max(math.ceil(math.log10(max(known)) + 0.05), first + 2)
    decades = [10.0**power for power in range(first, last + 1)]
    return Scale(decades[0], decades[-1], True, _thin(decades, keep=decades[0], most=7))


def linear_scale(values: Iterable[float], include: Sequence[float] = (0.0,), margin: float = 0.05) -> Scale:
    """A linear scale that holds `values` and `include`, with ticks at multiples of 1, 2 or 5 times a power of ten."""
    known = [*values, *include]
    low, high = min(known), max(known)
    if high - low <= 0:
        low, high = low - 1.0, high + 1.0
    pad = (high - low) * margin
    low, high = low - pad, high + pad
    step = _step((high - low) / 5)
    first, last = math.ceil(low / step), math.floor(high / step)
    return Scale(low, high, False, tuple(step * i for i in range(first, last + 1)))


def size_scale(values: Iterable[float]) -> Scale:
    """A linear scale from exactly 0 to the largest of `values`: lengths of bars are proportional to what they show."""
    return Scale(0.0, max([*values, 0.0]) or 1.0, False, (0.0,))


def _ratio_ticks(low: float, high: float) -> list[float]:
    steps = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0) if high / low < 12 else (1.0, 2.0, 5.0)
    above = [step * 10.0**power for power in range(7) for step in steps]
    below = (0.9, 0.8, 0.75, 0.6, 0.5, 0.4, 0.25, 0.2, 0.1, 0.05, 0.02, 0.01, 0.001)
    close = (1.1, 1.2, 1.25) if high / low < 2 else ()
    return sorted({tick for tick in (*above, *below, *close) if low <= tick <= high})


def _thin(ticks: Sequence[float], keep: float, most: int) -> tuple[float, ...]:
    """Drop ticks that stand too close on a logarithmic axis, always keeping `keep`."""
    if len(ticks) < 2:
        return tuple(ticks)
    span = math.log(ticks[-1] / ticks[0])
    gap = span / most
    kept: list[float] = [keep]
    for tick in sorted(ticks, key=lambda t: (len(f"{t:g}"), t)):
        if all(abs(math.log(tick / other)) >= gap * 0.98 for other in kept):
            kept.append(tick)
    return tuple(sorted(kept))


def _step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= rough * 0.999)


def _x(position: float) -> str:
    return f"{position:.3f}%"


def rule(scale: Scale, value: float, kind: str) -> Markup:
    """A vertical line over the whole height."""
    x = _x(scale.at(value))
    return Markup('<line class="{}" x1="{}" x2="{}" y1="0" y2="100%"/>').format(kind, x, x)


def grid(scale: Scale) -> Markup:
    """Faint vertical lines at the ticks."""
    return Markup("").join(rule(scale, tick, "grid") for tick in scale.ticks)


def band(scale: Scale, low: float | None, high: float | None, kind: str) -> Markup:
    """A tinted zone over the whole height; ``None`` reaches to the end of the plot."""
    left = 0.0 if low is None else scale.at(low)
    right = 100.0 if high is None else scale.at(high)
    width = _x(max(0.0, right - left))
    return Markup('<rect class="{}" x="{}" width="{}" y="0" height="100%"/>').format(kind, _x(left), width)


def whisker(scale: Scale, low: float, high: float, y: float, kind: str) -> Markup:
    """An interval: a horizontal line with short ends, `y` in pixels."""
    left, right = _x(scale.at(low)), _x(scale.at(high))
    stroke = Markup('<line class="{}" x1="{}" x2="{}" y1="{:g}" y2="{:g}"/>')
    return Markup("").join(
        (
            stroke.format(kind, left, right, y, y),
            stroke.format(kind, left, left, y - 4, y + 4),
            stroke.format(kind, right, right, y - 4, y + 4),
        )
    )


def dot(scale: Scale, value: float, y: float, kind: str, radius: float = 5) -> Markup:
    """A round mark at `value`."""
    return Markup('<circle class="{}" cx="{}" cy="{:g}" r="{:g}"/>').format(kind, _x(scale.at(value)), y, radius)


def diamond(scale: Scale, value: float, y: float, kind: str) -> Markup:
    """A diamond at `value`: a second kind of mark that differs by shape, not by colour alone."""
    return Markup(
        '<svg class="mark" x="{}" y="{:g}" overflow="visible"><path class="{}" d="M-5 0L0-5L5 0L0 5Z"/></svg>'
    ).format(_x(scale.at(value)), y, kind)


def bar(scale: Scale, value: float, y: float, height: float, kind: str) -> Markup:
    """A bar from the scale's start to `value`."""
    return Markup('<rect class="{}" x="0" y="{:g}" width="{}" height="{:g}" rx="2"/>').format(
        kind, y, _x(scale.at(value)), height
    )


def span(scale: Scale, start: float, end: float, y: float, height: float, kind: str) -> Markup:
    """A bar from `start` to `end`, wide enough to be seen."""
    left = scale.at(start)
    return Markup('<rect class="{}" x="{}" y="{:g}" width="{}" height="{:g}" rx="2"/>').format(
        kind, _x(left), y, _x(max(scale.at(end) - left, 0.3)), height
    )


def plot(marks: Iterable[Markup], title: str, height: int) -> Markup:
    """One row of a chart; `title` says in words what it shows (read aloud, and shown on hover)."""
    body = Markup("").join(marks)
    label = escape(title)
    return Markup(
        '<svg class="plot" role="img" aria-label="{}" width="100%" height="{}"><title>{}</title>{}</svg>'
    ).format(label, height, label, body)


def axis(scale: Scale, write: Callable[[float], str]) -> Markup:
    """The tick labels below a chart."""
    texts = []
    for tick in scale.ticks:
        position = scale.at(tick)
        anchor = "start" if position < 2 else "end" if position > 98 else "middle"
        texts.append(Markup('<text x="{}" y="12" text-anchor="{}">{}</text>').format(_x(position), anchor, write(tick)))
    return Markup('<svg class="axis" aria-hidden="true" width="100%" height="16">{}</svg>').format(
        Markup("").join(texts)
    )
