"""The plots of compression: size and speed against quality for every model, and how each step trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines.report import charts, curves
from pipelines.report.beside import Model
from pipelines.report.compression import TEACHER, CompressionView
from pipelines.report.curves import Curve, Plane
from pipelines.report.formats import count, dig, listing, mapping, number, percent, point, score, signed, significant

_HEIGHT, _CURVE_HEIGHT = 230, 150
_ASIDE = 15
"""Pixels between marks that would hide each other."""


def trade_panels(view: CompressionView) -> list[Curve]:
    """Size and speed against quality, the models joined in their order; none where there are fewer than two."""
    name = view.point
    size = _trade(
        view,
        lambda model: view.share(model, "bytes"),
        "smaller is left: size as a share of the teacher's, log scale",
        lambda value: percent(value, 2),
        "size",
    )
    if name is None or view.busy:
        return [size] if size else []
    speed = _trade(
        view,
        lambda model: model.speed(model.name if model.name in model.speeds else view.runner, name).value,
        f"faster is right: times {TEACHER} at {point(name)}, log scale",
        lambda value: f"{value:g}×",
        "speed",
    )
    return [panel for panel in (size, speed) if panel]


def _trade(
    view: CompressionView,
    cost: Callable[[Model], float | None],
    across: str,
    write: Callable[[float], str],
    what: str,
) -> Curve | None:
    labelled = any(model.quality.difference is not None for model in view.way)
    good = (lambda m: m.quality.difference) if labelled else (lambda m: m.quality.agreement)
    placed = [(m, x, y) for m in (*view.way, *view.selected) if (x := cost(m)) and x > 0 and (y := good(m)) is not None]
    if len(placed) < 2:
        return None
    drop = number(view.gate.get("max_drop")) if labelled else None
    values = [y for _, _, y in placed]
    if labelled:
        values += [end for m, _, _ in placed for end in (m.quality.low, m.quality.high) if end is not None]
        values += [] if drop is None else [-drop]
    up = charts.linear_scale(values, include=(0.0,) if labelled else (1.0,))
    plane = Plane(charts.ratio_scale(x for _, x, _ in placed), up, _HEIGHT)
    marks = [curves.level(plane, 0.0, "reference")] if labelled else []
    if drop is not None:
        marks += [curves.below(plane, -drop, "beyond"), curves.level(plane, -drop, "limit")]
    hops = [(m, x, y) for m, x, y in placed if m.variant is None and m not in view.selected]
    variants = [item for item in placed if item not in hops]
    marks.append(curves.line(plane, [(x, y) for _, x, y in hops], "path"))
    for _, x, y in variants if hops else ():
        marks.append(curves.line(plane, [hops[-1][1:], (x, y)], "path dashed"))
    for model, x, _ in placed:
        tone = _tone(view, model)
        q = model.quality
        if labelled and q.low is not None and q.high is not None:
            marks.append(curves.error_bar(plane, x, q.low, q.high, f"whisker {tone}"))
    # The first model on top: it stands where the others are moved aside from.
    badges = [
        curves.badge(
            plane,
            (x, y),
            model.mark,
            f"badge {_tone(view, model)}",
            square=model in view.selected,
            aside=_ASIDE * sum(_covered(plane, (x, y), other[1:]) for other in placed[:i]),
        )
        for i, (model, x, y) in enumerate(placed)
    ]
    marks += reversed(badges)
    digits = 1 if up.high - up.low > 1 else 2
    good_name = "Quality, points against the teacher" if labelled else "Agreement with the teacher"
    told = "; ".join(f"{m.mark} {m.name}: {what} {significant(x)}, {m.quality.sentence}" for m, x, _ in placed)
    up_write = (lambda v: signed(v, digits)) if labelled else (lambda v: significant(v))
    return curves.curve(plane, marks, f"{good_name}, by {what}", told, (write, up_write), across)


def _covered(plane: Plane, one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether two marks stand so close that one hides what is written in the other."""
    across = abs(plane.across.at(one[0]) - plane.across.at(other[0]))
    return across < 4 and abs(plane.y(one[1]) - plane.y(other[1])) < 14


def _tone(view: CompressionView, model: Model) -> str:
    # Agreement has no budget here: its threshold is that of a conversion.
    if model.quality.difference is not None and model.quality.verdict in ("failed", "inconclusive"):
        return model.quality.verdict
    return "chosen" if model in view.selected else "baseline" if model.is_teacher else "plain"


def training_panels(step: Mapping[str, Any], metric: str) -> list[Curve]:
    """Loss over the steps of training, that on the validation data too, and the score there."""
    training = mapping(step, "training")
    losses = _pairs(listing(training, "losses"), "loss")
    judged = listing(training, "evaluations")
    validation, scores = _pairs(judged, "loss"), _pairs(judged, "score")
    panels = []
    if len(losses) > 1 or len(validation) > 1:
        panels.append(
            _training(
                "Loss", [(losses, "path", ""), (validation, "path second", "second")], lambda v: significant(v, 2)
            )
        )
    if len(scores) > 1:
        panels.append(
            _training(
                f"{metric[:1].upper()}{metric[1:]} on validation data", [(scores, "path second", "second")], _score
            )
        )
    return panels


def _score(value: float) -> str:
    return f"{value:.3g}"


def _training(
    title: str, lines: Sequence[tuple[list[tuple[float, float]], str, str]], write: Callable[[float], str]
) -> Curve:
    drawn = [(points, kind, dots) for points, kind, dots in lines if points]
    everything = [pair for points, _, _ in drawn for pair in points]
    plane = Plane(
        charts.linear_scale([x for x, _ in everything], margin=0.0),
        charts.linear_scale([y for _, y in everything], include=()),
        _CURVE_HEIGHT,
    )
    marks = [curves.line(plane, points, kind) for points, kind, _ in drawn]
    # A dot for every evaluation would be a band where there are many.
    marks += [curves.dot(plane, x, y, d) for points, _, d in drawn if d and len(points) <= 30 for x, y in points]
    told = "; ".join(
        f"{title}, {'validation' if dots else 'training'}: {score(points[0][1])} at step {count(points[0][0])}, "
        f"{score(points[-1][1])} at step {count(points[-1][0])}"
        for points, _, dots in drawn
    )
    return curves.curve(plane, marks, title, told, (count, write), "step of training")


def _pairs(items: Sequence[Any], key: str) -> list[tuple[float, float]]:
    found = [(number(dig(item, "step")), number(dig(item, key))) for item in items]
    return [(x, y) for x, y in found if x is not None and y is not None]
