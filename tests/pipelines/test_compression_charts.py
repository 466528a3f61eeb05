"""The plots of compression: marks stand where the figures are."""

from __future__ import annotations

import re

import pytest

from pipelines.report.compression_charts import trade_panels, training_panels
from tests.pipelines.compression_examples import compressed, untimed
from tests.pipelines.test_report_compression import section, view


def test_models_stand_at_their_figures() -> None:
    report = compressed()
    size, speed = trade_panels(view(report))
    by_mark = {}
    for panel in (size, speed):
        found = re.findall(r'<svg x="([\d.]+)%" y="([\d.]+)"[^>]*><g[^>]*>.*?>(\w)</text>', str(panel.plot))
        by_mark[panel.title] = {mark: (float(x), float(y)) for x, y, mark in found}
        assert set(by_mark[panel.title]) == set("12345ab")
    smaller, faster = by_mark.values()
    assert smaller["a"][0] < smaller["4"][0] < smaller["3"][0] < smaller["2"][0] < smaller["1"][0]
    assert faster["1"][0] < faster["3"][0] < faster["4"][0] < faster["a"][0]
    for places in (smaller, faster):
        # Higher is better, and up is a smaller y: in equal steps for equal differences.
        per_point = (places["4"][1] - places["1"][1]) / 0.71
        assert places["3"][1] - places["1"][1] == pytest.approx(0.42 * per_point, abs=0.02)
        assert places["a"][1] - places["1"][1] == pytest.approx(0.80 * per_point, abs=0.02)
    line = re.search(r'class="path"[^>]*d="M([^"]+)"', str(size.plot))
    assert line is not None
    corners = [float(x) for x in line.group(1).replace("L", " ").split()][::2]
    assert corners == pytest.approx([smaller[mark][0] for mark in "12345"], abs=0.001)
    limit = re.search(r'class="limit"[^>]*y1="([\d.]+)"', str(size.plot))
    assert limit is not None
    assert float(limit.group(1)) - smaller["1"][1] == pytest.approx(2.0 * per_point, abs=0.05)


def test_marks_that_would_hide_each_other_stand_side_by_side() -> None:
    size, _ = trade_panels(view(compressed()))
    pairs = re.findall(r'translate\((\d+) 0\)">.*?>(\w)</text>', str(size.plot))
    aside = {mark: int(pixels) for pixels, mark in pairs}
    assert aside["4"] == aside["3"] == aside["1"] == 0
    assert 0 < aside["5"] < aside["b"]


def test_a_model_before_the_teacher_is_in_the_table_and_not_in_the_charts() -> None:
    report = untimed()
    assert "0 the source source, 52 min 0 s 0.9142 0.00 −0.10 to +0.10" in section(report)
    (size,) = trade_panels(view(report))
    assert set(re.findall(r">(\w)</text>", str(size.plot))) == set("12345ab")


def test_training_curves_stand_at_their_figures() -> None:
    step = {
        "training": {
            "losses": [{"step": 10, "loss": 3.0}, {"step": 20, "loss": 2.0}, {"step": 40, "loss": 1.0}],
            "evaluations": [{"step": 20, "loss": 2.5, "score": 0.5}, {"step": 40, "loss": 1.5, "score": None}],
        }
    }
    (loss,) = training_panels(step, "accuracy")  # a single score is no curve
    training, validation = (
        [float(value) for value in path.replace("L", " ").split()]
        for path in re.findall(r'<path[^>]*d="M([^"]+)"', str(loss.plot))
    )
    assert training[::2] == pytest.approx([25.0, 50.0, 100.0])
    assert validation[::2] == pytest.approx([50.0, 100.0])
    assert training[1] < validation[1] < training[3] < validation[3] < training[5]
    assert training[3] - training[1] == pytest.approx(training[5] - training[3], abs=0.02)
    assert training_panels({"training": None}, "accuracy") == []
