"""The report: what it says, that it escapes and loads nothing, and that its marks stand where the numbers are."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.report import charts, formats, panels, render_html, render_json
from pipelines.report.view import ReportView
from tests.pipelines.pages import Page, check_alone, check_links
from tests.pipelines.report_examples import EXAMPLES, HOSTILE, full, hostile, nothing_selected, point_figures


@pytest.mark.parametrize("name", EXAMPLES)
def test_page_is_well_formed_and_loads_nothing(name: str) -> None:
    check_alone(Page(render_html(EXAMPLES[name]())))


@pytest.mark.parametrize("name", EXAMPLES)
def test_ids_are_unique_and_links_lead_somewhere(name: str) -> None:
    check_links(Page(render_html(EXAMPLES[name]())))


@pytest.mark.parametrize("name", [n for n in EXAMPLES if n != "nulls"])
def test_every_variant_and_every_point_is_named(name: str) -> None:
    report = EXAMPLES[name]()
    text = Page(render_html(report)).text
    for item in report.get("variants", []):
        assert item["id"] in text
        if item["status"] == "skipped":
            assert item["reason"].split(":")[0] in text
    for variant in report.get("variants", []):
        for point in variant["points"]:
            assert formats.point(point) in text


def test_verdict_comes_first_and_names_what_to_ship_at_each_point() -> None:
    text = Page(render_html(full())).text
    body = text[text.index("Ready to ship") :]
    assert body.index("Ship onnxruntime-cpu-fp32: 2.37x") < body.index("What to ship") < body.index("Every candidate")
    routes = body[body.index("What to ship") : body.index("Every candidate")]
    assert re.search(r"1 × 16 onnxruntime-cpu-fp32 2\.37× ?2\.30–2\.44", routes)
    assert re.search(r"8 × 128 inductor-cpu-fp32 1\.22× ?1\.18–1\.26 1\.12×", routes)


def test_numbers_of_a_variant_stand_in_the_tables() -> None:
    text = Page(render_html(full())).text
    figures = point_figures("1x16", 2.37)
    expected = " ".join(formats.milliseconds(figures[key]) for key in ("p50_ms", "p90_ms", "p99_ms", "host_p50_ms"))
    assert f"onnxruntime-cpu-fp32 {expected} 2.37×" in text
    assert "90.9 MB" in text
    assert "412 MB" in text
    assert "6.2×10⁻⁷" in text
    assert "21 % of the limit" in text
    assert "0.8625" in text
    assert "−0.35" in text
    assert "−1.15 to +0.45" in text
    assert "about 1,900 more samples would settle it" in text
    assert "22.7 million" in text
    assert "Energy was not measured: this machine has no readable energy counter." in text
    assert "every row of attention_mask attends to at least one token; input_ids from 0 to 30,521" in text


def test_overall_is_the_geometric_mean_over_the_points() -> None:
    view = ReportView(full())
    assert view.winner is not None
    assert view.winner.overall == pytest.approx(float(np.prod([2.37, 1.86, 1.12, 1.03]) ** 0.25))
    assert view.winner.overall_low == pytest.approx(float(np.prod([2.37, 1.86, 1.12, 1.03]) ** 0.25) * 0.97)


def test_variants_are_listed_best_first() -> None:
    ids = [v.id for v in ReportView(full()).variants]
    assert ids[0] == "onnxruntime-cpu-fp32"
    assert ids.index("openvino-cpu-fp32") < ids.index("openvino-cpu-bf16") < ids.index("onnxruntime-cpu-fp16")
    assert set(ids[-3:]) == {"tensorrt-fp16", "onnxruntime-cuda-fp32", "onnxruntime-cuda-fp16"}


def test_speed_ups_of_a_busy_machine_are_disowned_where_they_stand_first() -> None:
    told = "other programs took 38% of the processors while they were measured"
    quiet, busy = (render_html(full() | {"environment": {"busy_elsewhere": share}}) for share in (0.2, 0.38))
    assert told not in quiet
    assert "lower bound" in quiet
    tiles = busy[busy.index('class="tiles') : busy.index("</dl>")]
    assert f"not to be relied on: {told}" in tiles
    assert "lower bound" not in tiles
    assert f"<strong>These figures cannot be relied on:</strong> {told}" in busy


def test_a_run_without_a_winner_says_do_not_ship_and_what_came_closest() -> None:
    text = Page(render_html(nothing_selected())).text
    assert "Do not ship" in text
    assert "No variant passed its gates" in text
    assert "What came closest: openvino-cpu-bf16, inconclusive" in text
    assert "What to ship" not in text


def test_the_closest_failed_variant_is_the_one_nearest_to_its_limit() -> None:
    report = nothing_selected()
    report["variants"] = [v for v in report["variants"] if v["status"] == "failed"]
    text = Page(render_html(report)).text
    assert re.search(r"What came closest: onnxruntime-cpu-fp32, failed, with 1\.5 × the error that parity allows", text)


def test_a_selected_variant_in_a_failed_run_is_shown_with_a_warning() -> None:
    report = full()
    report["verdict"] |= {"ok": False, "sentence": None}
    text = Page(render_html(report)).text
    assert "A variant that the recipe requires did not pass" in text
    assert "the run as a whole did not succeed" in text


def test_built_in_sentences_are_announced_only_when_used() -> None:
    report = full()
    assert "Built-in data were used for parity" in Page(render_html(report)).text
    report["data"].pop("parity")
    assert "Built-in data were used" not in Page(render_html(report)).text


def test_hostile_texts_stay_texts() -> None:
    html = render_html(hostile())
    assert "<script" not in html
    assert "<img" not in html
    page = Page(html)
    assert page.text.count(HOSTILE) > 15
    assert any(HOSTILE in label for label in page.attributes("aria-label"))


def test_a_very_long_reason_is_folded_but_complete() -> None:
    html = render_html(hostile())
    story = "a very long story about what went wrong, "
    assert html.count(story * 200) == 1
    assert '<details class="more">' in html


def test_enabling_commands_are_code() -> None:
    html = render_html(full())
    assert '<code class="cmd">pip install &#39;planish[gpu]&#39;</code>' in html


@pytest.mark.parametrize(
    ("text", "commands"),
    [
        ("no driver. On a machine with a GPU: pip install 'planish[gpu]'", ["pip install 'planish[gpu]'"]),
        ("g++ was not found. apt-get install g++", ["apt-get install g++"]),
        ("run `planish doctor --json` first; then pip install x", ["planish doctor --json"]),
        ("install it with: pip install torch.", ["pip install torch"]),
        ("(make setup)", ["make setup"]),
        ("quality: the interval is too wide", []),
        ("", []),
    ],
)
def test_commands_are_found_and_no_text_is_lost(text: str, commands: list[str]) -> None:
    parts = formats.with_commands(text)
    assert [part for is_command, part in parts if is_command] == commands
    assert "".join(part for _, part in parts) == text.replace("`", "")


def marks(svg: str, tag: str, kind: str) -> list[float]:
    """Horizontal positions in percent of the marks of one kind."""
    key = "cx" if tag == "circle" else "x" if tag in ("rect", "svg") else "x1"
    page = Page(str(svg))
    found = [a for t, a in page.tags if t == tag and kind in (a.get("class") or "").split()]
    return [float((a[key] or "").rstrip("%")) for a in found]


def test_speed_marks_stand_where_the_values_are() -> None:
    view = ReportView(full())
    scale = panels.speed_scale(view)
    for panel, name in zip(panels.speed_panels(view), view.points, strict=True):
        rows = {row.label: str(row.plot) for row in panel.rows}
        assert [row.label for row in panel.rows] == sorted(
            rows, key=lambda label: marks(rows[label], "circle", "first")[0], reverse=True
        )
        for variant in view.timed:
            if name not in variant.points:
                continue
            figures = variant.points[name]
            svg = rows[variant.id]
            span = math.log(scale.high / scale.low)

            def at(value: float, span: float = span) -> float:
                return 100 * math.log(value / scale.low) / span

            assert marks(svg, "circle", "first") == [pytest.approx(at(figures["speedup"]), abs=1e-3)]
            ends = [at(figures["speedup_low"]), at(figures["speedup_high"])]
            assert marks(svg, "line", "first") == pytest.approx([ends[0], *ends], abs=1e-3)
            assert marks(svg, "svg", "mark") == [pytest.approx(at(figures["speedup_vs_best_pytorch"]), abs=1e-3)]
            assert marks(svg, "line", "reference") == [pytest.approx(at(1.0), abs=1e-3)]


def test_parity_marks_stand_at_error_floor_and_limit() -> None:
    view = ReportView(full())
    panel = panels.parity_panel(view)
    assert panel is not None
    row = next(row for row in panel.rows if row.label == "onnxruntime-cpu-fp32")
    svg = str(row.plot)
    positions = {
        value: marks(svg, tag, kind)[0]
        for value, tag, kind in (
            (6.2e-7, "circle", "first"),
            (2.9e-7, "line", "floor"),
            (2.9e-6, "line", "limit"),
        )
    }
    # On a logarithmic axis equal ratios are equal distances, whatever the ends are.
    decade = positions[2.9e-6] - positions[2.9e-7]
    for value, position in positions.items():
        assert position == pytest.approx(positions[2.9e-7] + decade * math.log10(value / 2.9e-7), abs=0.01)


def test_quality_marks_stand_at_difference_and_budget() -> None:
    (panel,) = panels.quality_panels(ReportView(full()))
    svg = str(next(row for row in panel.rows if row.label == "openvino-cpu-bf16").plot)
    zero, drop, worst = marks(svg, "line", "reference")[0], *marks(svg, "line", "limit")
    assert worst < drop < zero
    unit = (zero - worst) / 1.0
    assert zero - drop == pytest.approx(0.5 * unit, abs=0.01)
    assert zero - marks(svg, "circle", "first")[0] == pytest.approx(0.35 * unit, abs=0.01)
    assert marks(svg, "line", "inconclusive")[:2] == pytest.approx([zero - 1.15 * unit] * 2, abs=0.01)


def test_a_gates_chart_shows_that_gates_verdict() -> None:
    view = ReportView(full())
    parity, (quality,) = panels.parity_panel(view), panels.quality_panels(view)
    assert parity is not None
    tones = {row.label: row.tone for row in parity.rows}
    assert tones["openvino-cpu-bf16"] == "plain"
    assert tones["onnxruntime-cpu-fp16"] == "failed"
    assert {row.label: row.tone for row in quality.rows}["onnxruntime-cpu-fp16"] == "plain"


def test_bars_are_proportional() -> None:
    panel = panels.memory_panel(ReportView(full()))
    assert panel is not None
    widths = {row.label: re.search(r'width="([\d.]+)%" height="12"', str(row.plot)) for row in panel.rows}
    share = {label: float(found.group(1)) for label, found in widths.items() if found}
    assert share["torch.compile"] == 100
    assert share["openvino-cpu-fp32"] == pytest.approx(100 * 540 / 910, abs=1e-3)


def test_stages_stand_where_they_began_and_are_as_long_as_they_took() -> None:
    panel = panels.timeline_panel(ReportView(full()))
    assert panel is not None
    found = {row.label: re.search(r'x="([\d.]+)%" y="5" width="([\d.]+)%"', str(row.plot)) for row in panel.rows}
    bars = {label: (float(mark.group(1)), float(mark.group(2))) for label, mark in found.items() if mark}
    assert bars["optimize"] == pytest.approx((20.0, 20.0), abs=1e-3)
    assert bars["verify latency"] == pytest.approx((60.0, 40.0), abs=1e-3)
    assert bars["export ONNX"][1] < 1  # it came from the cache
    assert {row.label: row.value for row in panel.rows}["export ONNX"] == "cached"


def test_sensitivity_shows_what_is_kept_first_and_what_the_search_came_to() -> None:
    (panel,) = panels.sensitivity_panels(ReportView(full()))
    assert panel.title == "openvino-cpu-int8-static-kept"
    assert [(row.label, row.tone, row.value) for row in panel.rows[:2]] == [
        ("encoder.layer.3.output", "chosen", "0.40"),
        ("encoder.layer.0.output", "plain", "≈ 0.010"),
    ]
    assert len(panel.rows) == panels.MOST_LAYERS
    assert "1 of 30 layers" in panel.note
    assert "7.47 behind" in panel.note
    report = full()
    report["precision"]["openvino-cpu-int8-static-kept"]["search"]["passed"] = False
    (panel,) = panels.sensitivity_panels(ReportView(report))
    assert "No choice of layers passes" in panel.note


def test_tables_in_int8_are_told() -> None:
    text = Page(render_html(full())).text
    assert "1 embedding table in int8" in text
    assert "embeddings.word_embeddings/Gather in int8: 30,522 rows of 384, 11.8 MB instead of 46.9 MB" in text


def test_a_measure_that_informs_is_not_called_inconclusive() -> None:
    report = full()
    measure = {"name": "label agreement", "value": 0.98, "threshold": None, "verdict": "informs"}
    for item in report["variants"]:
        if item["gates"].get("quality", {}).get("difference") is not None:
            item["gates"]["quality"]["measures"] = [measure]
    text = Page(render_html(report)).text
    assert "for information label agreement" in text


def test_charts_of_many_variants_keep_the_selected_one() -> None:
    report = EXAMPLES["crowded"]()
    slowest = report["variants"][0]["id"]
    report["verdict"]["selected"]["1x8"] = slowest
    panel = panels.speed_panels(ReportView(report))[0]
    assert slowest in [row.label for row in panel.rows]
    assert len(panel.rows) == panels.MOST_ROWS + 1
    assert panel.note == "11 slower variants are in the table of latencies."


@pytest.mark.parametrize("values", [[], [1.0], [0.01, 900.0], [2.2, 2.4], [0.0, -1.0], [1e-300, 1e300]])
def test_scales_hold_their_values_and_their_ticks(values: list[float]) -> None:
    for scale in (charts.ratio_scale(values), charts.decade_scale(values), charts.linear_scale(values)):
        assert scale.low < scale.high
        assert all(0 <= scale.at(v) <= 100 for v in values)
        positions = [scale.at(tick) for tick in scale.ticks]
        assert positions == sorted(positions)
        assert all(scale.low <= tick <= scale.high * (1 + 1e-9) for tick in scale.ticks)
        assert 1 <= len(scale.ticks) <= 14
    assert 1.0 in charts.ratio_scale(values).ticks


def test_the_parity_chart_shows_the_case_nearest_to_its_own_limit() -> None:
    report = full()
    gate = report["variants"][1]["gates"]["parity"]
    # The largest error belongs to an output with a wide limit; another output is nearer to its narrow one.
    gate["outputs"]["last_hidden_state"]["rms_relative"] = 1e-3
    gate |= {"floor": 1e-7, "limit": 1e-6, "ratio": 0.5}
    panel = panels.parity_panel(ReportView(report))
    assert panel is not None
    row = next(row for row in panel.rows if row.label == "onnxruntime-cpu-fp32")
    assert (row.value, row.detail) == ("5.0×10⁻⁷", "50 % of the limit")
    assert marks(str(row.plot), "circle", "first")[0] < marks(str(row.plot), "line", "limit")[0]


def test_points_that_the_model_does_not_take_are_told_also_where_nothing_was_timed() -> None:
    report = nothing_selected() | {"latency": {"dropped_points": ["1x4: the model takes lengths from 8 to 64"]}}
    assert "Not measured at 1x4: the model takes lengths from 8 to 64." in Page(render_html(report)).text
    assert "Not measured at" not in Page(render_html(full())).text


def test_what_could_not_be_timed_is_named_with_its_reason() -> None:
    report = full()
    report["variants"][6]["gates"]["latency"] = {"verdict": "failed", "reason": "the worker crashed (SIGSEGV)"}
    assert "Not timed: onnxruntime-cpu-fp16. the worker crashed (SIGSEGV)" in Page(render_html(report)).text


def test_what_a_gpu_did_when_kept_busy_is_shown_with_the_most_runs_first() -> None:
    assert "The GPU kept busy" not in Page(render_html(full())).text
    report = full()
    names = ("energy_j", "power_w", "run_ms", "runs_per_s")
    name = ReportView(report).points[0]
    for number, figures in enumerate([(0.0282, 166, 0.166, 5869.0), (1.61, 501.4, 3.38, 311.0)]):
        points = {name: dict(zip(names, figures, strict=True))}
        report["variants"][number]["device"] = {"memory_bytes": 1_115_684_864, "points": points, "reason": ""}
    report["baselines"]["eager"]["device"] = {
        "memory_bytes": None,
        "points": {name: {"run_ms": 1.0, "runs_per_s": 1000.0, "energy_j": None, "power_w": None}},
        "reason": "NVML was not found",
    }
    view = ReportView(report)
    assert [[row.label for row in rows] for _, rows in view.device_rows] == [
        [report["variants"][0]["id"], "eager PyTorch", report["variants"][1]["id"]]
    ]
    text = Page(render_html(report)).text
    told = text[text.index("The GPU kept busy") :]
    assert re.search(r"0\.166\s+5\.87 k\s+28\.2 mJ\s+166 W\s+1\.12 GB", told)
    assert re.search(r"1\.00\s+1\.00 k\s+–\s+–\s+–", told)
    assert re.search(r"3\.38\s+311\s+1,610 mJ\s+501 W\s+1\.12 GB", told)
    assert "Sensors: NVML was not found" in told


def test_consistency_between_alone_and_in_a_batch_is_shown() -> None:
    report = full()
    report["variants"][1]["gates"]["parity"]["consistency"] = [
        {"case": "alone-3", "partner": "ragged", "output": "y", "original": 1e-7, "variant": 3e-7, "limit": 4e-6}
        | {"verdict": "passed", "reason": "within"}
    ]
    assert "alone-3, ragged y 1.0×10⁻⁷ 3.0×10⁻⁷ 4.0×10⁻⁶" in Page(render_html(report)).text


def test_an_error_of_exactly_zero_is_drawn_at_the_left_end() -> None:
    report = full()
    first = report["variants"][1]["gates"]["parity"]
    for figures in first["outputs"].values():
        figures["rms_relative"] = 0.0
    first["ratio"] = 0.0
    panel = panels.parity_panel(ReportView(report))
    assert panel is not None
    row = next(row for row in panel.rows if row.label == "onnxruntime-cpu-fp32")
    assert marks(str(row.plot), "circle", "first") == [0.0]
    assert row.value == "0"


def contrast(first: str, second: str) -> float:
    """Contrast of two #rrggbb colours after WCAG 2.1."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_has_enough_contrast_in_light_and_dark() -> None:
    css = "".join(Page(render_html(full())).styles)
    themes = [dict(re.findall(r"--([\w-]+): (#\w{6});", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S)]
    themes = [theme for theme in themes if "ink" in theme]
    assert len(themes) == 2
    for theme in themes:
        for name in ("ink", "soft", "accent", "second", "failed", "inconclusive", "passed", "skipped"):
            for ground in ("page", "surface", "sunken"):
                assert contrast(theme[name], theme[ground]) >= 4.5, (name, ground)
        for name in ("failed", "inconclusive", "passed", "skipped", "accent"):
            assert contrast(theme[name], theme[f"{name}-soft"]) >= 4.5, name


def test_the_json_comes_back() -> None:
    report = full()
    assert json.loads(render_json(report)) == report
    assert render_html(json.loads(render_json(report))) == render_html(report)


def test_json_is_strict_whatever_the_numbers_are() -> None:
    odd: dict[str, Any] = {
        "nan": float("nan"),
        "inf": [float("inf"), -math.inf],
        "numpy": {"f": np.float32(0.5), "i": np.int64(3), "b": np.bool_(True), "n": np.float64("nan")},
        "path": Path("a/b"),
        "text": "é\ud800",
    }
    report = full() | {"odd": odd, "name": "broken \ud800 name"}

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    read = json.loads(render_json(report).decode("utf-8"), parse_constant=refuse)
    assert read["odd"]["nan"] is None
    assert read["odd"]["inf"] == [None, None]
    assert read["odd"]["numpy"] == {"f": 0.5, "i": 3, "b": True, "n": None}
    assert read["odd"]["path"] == str(Path("a/b"))
    assert "broken" in render_html(report)


def test_numpy_figures_are_shown() -> None:
    report = full()
    report["variants"][1]["bytes"] = np.int64(12_300_000)
    report["variants"][1]["peak_rss_bytes"] = np.float32(4.56e8)
    text = Page(render_html(report)).text
    assert "12.3 MB" in text
    assert "456 MB" in text


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (formats.ratio, 2.3149, "2.31×"),
        (formats.ratio, 9.996, "10.0×"),
        (formats.ratio, 12.34, "12.3×"),
        (formats.ratio, None, "–"),
        (formats.ratio, float("nan"), "–"),
        (formats.milliseconds, 0.04821, "0.0482"),
        (formats.milliseconds, 4820.4, "4,820"),
        (formats.milliseconds, 9.996, "10.0"),
        (formats.milliseconds, 0, "0"),
        (formats.size, 90_868_376, "90.9 MB"),
        (formats.size, 999_999, "1.00 MB"),
        (formats.size, 812, "812 B"),
        (formats.size, 5_400_000_000, "5.40 GB"),
        (formats.scientific, 3.14e-7, "3.1×10⁻⁷"),
        (formats.scientific, 9.99e-7, "1.0×10⁻⁶"),
        (formats.scientific, 0.0, "0"),
        (formats.scientific, 12.34, "12"),
        (formats.cosine, 0.99999999, "0.999999"),
        (formats.cosine, 1.0, "1"),
        (formats.score, 0.88632, "0.8863"),
        (formats.score, 0.99999, "0.999990"),
        (formats.signed, -0.304, "−0.30"),
        (formats.signed, 0.12, "+0.12"),
        (formats.signed, -0.001, "0.00"),
        (formats.percent, 0.2138, "21.4 %"),
        (formats.large_count, 22_713_216, "22.7 million"),
        (formats.large_count, 1_300_000_000, "1.30 billion"),
        (formats.duration, 83, "1 min 23 s"),
        (formats.duration, 59.96, "1 min 0 s"),
        (formats.duration, 0.42, "0.42 s"),
        (formats.duration, 7260, "2 h 1 min"),
        (formats.when, "2026-07-31T16:02:11+02:00", "31 July 2026, 14:02 UTC"),
        (formats.when, "yesterday", "yesterday"),
        (formats.point, "8x128", "8 × 128"),
        (formats.point, "overall", "overall"),
        (formats.shown, True, "yes"),
        (formats.short, "one two three four", "one two three four"),
    ],
)
def test_formats(function: Any, value: Any, text: str) -> None:
    assert function(value) == text
