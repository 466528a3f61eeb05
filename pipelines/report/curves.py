"""Plots with two axes as inline SVG, for any width: horizontal positions are percentages, vertical ones pixels.

The vertical axis is a drawing of its own beside the plot, so that its labels keep their room on a narrow screen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from pipelines.report import charts
from pipelines.report.charts import Scale

_MARGIN = 10
"""Pixels above and below the plot's own range, so that marks and labels at its ends are whole."""


@dataclass(frozen=True)
class Plane:
    """Where values stand: `across` in percent, `up` over `height` pixels, the larger the higher."""

    across: Scale
    up: Scale
    height: int

    def y(self, value: float) -> float:
        return _MARGIN + (self.height - 2 * _MARGIN) * (1 - self.up.at(value) / 100)


@dataclass(frozen=True)
class Curve:
    """A finished plot with its axes."""

    title: str
    plot: Markup
    left: Markup
    bottom: Markup
    across: str
    note: str = ""


def line(plane: Plane, points: Sequence[tuple[float, float]], kind: str) -> Markup:
    """Straight lines from point to point."""
    if len(points) < 2:
        return Markup()
    steps = " ".join(f"{plane.across.at(x):.3f} {plane.y(y):.2f}" for x, y in points)
    return Markup(
        '<svg x="0" y="0" width="100%" height="{h}" viewBox="0 0 100 {h}" preserveAspectRatio="none" '
        'overflow="visible">'
        '<path class="{kind}" vector-effect="non-scaling-stroke" d="M{steps}"/></svg>'
    ).format(h=plane.height, kind=kind, steps=steps)


def level(plane: Plane, value: float, kind: str) -> Markup:
    """A horizontal line over the whole width."""
    y = f"{plane.y(value):.2f}"
    return Markup('<line class="{}" x1="0" x2="100%" y1="{}" y2="{}"/>').format(kind, y, y)


def below(plane: Plane, value: float, kind: str) -> Markup:
    """A tinted zone from `value` down."""
    y = plane.y(value)
    return Markup('<rect class="{}" x="0" width="100%" y="{:.2f}" height="{:.2f}"/>').format(kind, y, plane.height - y)


def error_bar(plane: Plane, x: float, low: float, high: float, kind: str) -> Markup:
    """An upright interval at `x`."""
    at = f"{plane.across.at(x):.3f}%"
    return Markup('<line class="{}" x1="{}" x2="{}" y1="{:.2f}" y2="{:.2f}"/>').format(
        kind, at, at, plane.y(low), plane.y(high)
    )


def dot(plane: Plane, x: float, y: float, kind: str) -> Markup:
    """A small round mark."""
    return charts.dot(plane.across, x, plane.y(y), kind, 3.5)


def badge(plane: Plane, place: tuple[float, float], text: str, kind: str, *, square: bool, aside: int = 0) -> Markup:
    """A mark with a letter or a short number in it, round or square, moved `aside` by pixels where others stand."""
    x, y = place
    shape = (
        Markup('<rect class="{}" x="-9" y="-9" width="18" height="18" rx="3"/>')
        if square
        else Markup('<circle class="{}" cx="0" cy="0" r="9.5"/>')
    ).format(kind)
    return Markup(
        '<svg x="{:.3f}%" y="{:.2f}" overflow="visible"><g transform="translate({} 0)">{}'
        '<text class="inside" y="4">{}</text></g></svg>'
    ).format(plane.across.at(x), plane.y(y), aside, shape, text)


def curve(
    plane: Plane,
    marks: Iterable[Markup],
    title: str,
    told: str,
    write: tuple[Callable[[float], str], Callable[[float], str]],
    across: str,
    note: str = "",
) -> Curve:
    """Marks over a grid, with axes.

    Args:
        plane: Where they stand.
        marks: The later ones on top.
        title: Above the plot; what the vertical axis shows.
        told: What the plot shows, in words (read aloud, and shown on hover).
        write: How values of the horizontal and of the vertical axis are written.
        across: What the horizontal axis shows.
        note: Below it.
    """
    grid = [level(plane, tick, "grid") for tick in plane.up.ticks] + [charts.grid(plane.across)]
    body = Markup("").join([*grid, *marks])
    label = escape(told)
    plot = Markup(
        '<svg class="plot" role="img" aria-label="{}" width="100%" height="{}"><title>{}</title>{}</svg>'
    ).format(label, plane.height, label, body)
    texts = Markup("").join(
        Markup('<text x="100%" y="{:.2f}" text-anchor="end">{}</text>').format(plane.y(tick) + 4, write[1](tick))
        for tick in plane.up.ticks
    )
    left = Markup('<svg class="axis" aria-hidden="true" width="100%" height="{}">{}</svg>').format(plane.height, texts)
    return Curve(title, plot, left, charts.axis(plane.across, write[0]), across, note)
