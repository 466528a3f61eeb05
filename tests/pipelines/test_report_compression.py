"""Compression in the report: what is told of every model beside its teacher, and that marks stand where figures are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts import Artifacts
from pipelines.assemble import Results, sentence
from pipelines.assemble import report as assemble_report
from pipelines.bundle import Bundle
from pipelines.compress.brief import MOST_POINTS, brief_steps
from pipelines.compress.summary import Compression
from pipelines.report import render_html
from pipelines.report.compression import CompressionView
from pipelines.report.compression_charts import trade_panels
from pipelines.report.compression_steps import step_views
from pipelines.report.view import ReportView
from pipelines.runner import outcome
from pipelines.workshop import Made
from tests.pipelines.compression_examples import (
    EXAMPLES,
    INT8,
    compressed,
    hostile,
    lost_too_much,
    without_labels,
)
from tests.pipelines.pages import Page, check_alone, check_links
from tests.pipelines.report_examples import HOSTILE, full
from tests.pipelines.test_sentence import written

SHIPPED = (
    f"Ship {INT8}: 5.79× to 12.3× the teacher in eager PyTorch (most at 1 × 16), 8.1 % of its size, "
    "−0.80 points of macro F1 (−1.70 to +0.10)"
)
LOST = "ompression lost too much: −3.10 points of macro F1 (−4.20 to −2.00); 2 may be lost"


def view(report: dict[str, Any]) -> CompressionView:
    found = ReportView(report).compression
    assert found is not None
    return found


def section(report: dict[str, Any]) -> str:
    """The text of the section."""
    text = Page(render_html(report)).text
    return text[text.index("Every model on the way") : text.index("Every candidate that ran")]


@pytest.mark.parametrize("name", EXAMPLES)
def test_page_is_well_formed_and_loads_nothing(name: str) -> None:
    page = Page(render_html(EXAMPLES[name]()))
    check_alone(page)
    check_links(page)
    assert "compression" in page.attributes("id")


def test_without_compression_nothing_is_said_of_it() -> None:
    page = Page(render_html(full()))
    assert "compression" not in page.attributes("id")
    assert "eacher" not in page.text


def test_every_model_stands_in_the_table_beside_the_teacher() -> None:
    text = section(compressed())
    assert "1 fine-tuned teacher 1-finetune, 52 min 0 s 0.9142 438 MB 109 M 170 M 1× 1.46× 1.41–1.50" in text
    third = (
        "3 distilled into 6 layers 3-distil, 52 min 0 s 0.9100 −0.42 −1.27 to +0.43 213 MB 49 % 53.3 M 85.0 M 50 % "
        "1.73× 1.68–1.78 2.52× 2.44–2.59 1.73× there 2.26× 2.19–2.33 1.73× there"
    )
    assert third in text
    assert "34.9 M 38 % zero" in text


def test_conversion_and_compression_are_told_apart() -> None:
    text = section(compressed())
    variants = text[text.index("compression and conversion together") :]
    chosen = (
        f"a {INT8} overall, 1 × 16, 1 × 32 conversion alone: −0.12 (−0.32 to +0.08) points, RMS error 0.041 "
        "0.9062 −0.80 −1.70 to +0.10 35.3 MB 8.1 % 7.45×"
    )
    assert chosen in variants


def test_speeds_of_all_points_are_there() -> None:
    text = section(compressed())
    assert f"Selected variants a {INT8} 12.3× 11.9–12.7 9.57× 9.28–9.86 7.45× 7.22–7.67 5.79× 5.62–5.97" in text


def test_the_page_begins_with_what_is_shipped_against_the_teacher() -> None:
    text = Page(render_html(compressed())).text
    head = text[text.index("Ready to ship") : text.index("Every model on the way")]
    assert head.index(SHIPPED) < head.index("What to ship")
    assert "mean of all operating points; 3.19× over the compressed model in eager PyTorch" in head
    assert "points, interval −1.70 to +0.10; by conversion alone −0.12" in head
    assert "8.1 % of the teacher's 438 MB" in head
    assert f"1 × 16 {INT8} 12.3× 11.9–12.7 3.90×" in head
    assert "Compression kept its budget: −0.68 points of macro F1 (−1.53 to +0.17); 2 may be lost, 4 at" in head


def test_a_model_that_lost_too_much_is_not_to_be_shipped_whatever_the_document_says() -> None:
    report = lost_too_much()
    report["verdict"] |= {"ok": True, "sentence": SHIPPED}
    html = render_html(report)
    text = Page(html).text
    assert "Ready to ship" not in text
    assert SHIPPED not in text
    assert f"Do not ship: c{LOST}" in text
    assert "What was selected" in text
    assert "What to ship" not in text
    assert "<title>Do not ship" in html


def test_without_labels_the_loss_is_said_to_be_unknown() -> None:
    report = without_labels()
    text = Page(render_html(report)).text
    assert "label agreement with it 0.9400. Without labels what it lost is not known" in text
    assert "What compression lost is not known: the evaluation data have no labels that the task's metric takes" in text
    assert "Ready to ship" in text
    assert "0.9600 label agreement" in section(report)
    assert not view(report).over_budget


@pytest.mark.parametrize("verdict", ["passed", "failed", "inconclusive", "skipped"])
def test_page_sentence_and_exit_status_agree(verdict: str, tmp_path: Path) -> None:
    report = compressed()
    gate = report["compression"]["gate"]
    gate["verdict"] = verdict
    manifest = written({}).model_copy(update={"compression": report["compression"]})
    fine = outcome(Bundle(tmp_path, manifest)) is None
    manifest = manifest.model_copy(update={"selected": {"overall": INT8}})
    assert ReportView(report).ok is fine
    assert sentence(manifest, {}).startswith("Ship" if fine else "Do not ship: ")


def test_the_sentence_of_a_run_is_against_the_teacher() -> None:
    report = compressed()
    manifest = written({}).model_copy(update={"compression": report["compression"], "selected": {"overall": INT8}})
    assert sentence(manifest, {}) == SHIPPED
    report["compression"]["selected"][INT8]["times_teacher_eager"].pop("8x128")
    for name in ("1x16", "1x128"):
        report["compression"]["selected"][INT8]["times_teacher_eager"].pop(name)
    assert ": 9.57× the teacher in eager PyTorch at 1 × 32, 8.1 % of its size, −0.80" in sentence(manifest, {})


def test_no_speeds_of_a_busy_machine() -> None:
    report = compressed()
    report["compression"]["busy_elsewhere"] = 0.42
    told = ReportView(report).sentence
    assert "×" not in told
    assert "8.1 % of the teacher's size, −0.80 points" in told
    assert "42%" in told
    assert [panel.title for panel in trade_panels(view(report))] == ["Quality, points against the teacher, by size"]
    text = Page(render_html(report)).text
    assert "(8.44×) not to be relied on: other programs took 42 %" in text
    assert "The speeds in this section cannot be relied on" in text


def test_a_variant_that_loses_more_than_the_budget_with_conversion_is_named() -> None:
    report = compressed()
    report["compression"]["selected"][INT8]["quality"] |= {"verdict": "failed", "difference": -2.3}
    assert f"{INT8} loses −2.30 points with conversion: more than the budget" in section(report)
    assert "more than the budget" not in section(compressed())


def test_hostile_texts_stay_texts() -> None:
    html = render_html(hostile())
    assert "<script" not in html
    assert "<img" not in html
    page = Page(html)
    assert page.text.count(HOSTILE) > 30
    assert any(HOSTILE in label for label in page.attributes("aria-label"))


def test_steps_tell_what_they_removed_and_how_they_trained() -> None:
    steps = {step.name: step for step in step_views(view(compressed()))}
    assert dict(steps["2-prune"].facts)["Tokens"] == "12,840 of 30,522 kept (42 %)"
    assert dict(steps["2-prune"].facts)["Parameters"] == "13.6 million fewer"
    assert dict(steps["2-prune"].facts)["Trained"] == "no"
    assert dict(steps["3-distil"].facts)["Student"] == "layers 0, 2, 4, 7, 9, 11 of 12"
    assert dict(steps["4-prune"].facts)["Heads"] == "50 of 72 left (69 %)"
    assert steps["4-prune"].layers[0] == ("heads", [(str(n), "of 12") for n in (5, 8, 9, 10, 9, 9)])
    assert steps["4-prune"].settings.endswith("recover (epochs 3, batch size 32, learning rate 2e-05, schedule linear)")
    assert steps["5-prune"].matrices[0] == ("bert.encoder.layer.0.attention.self.query.weight", "50.0 %")
    text = section(compressed())
    assert "heads 5 of 12 8 of 12 9 of 12" in text
    assert "6,315 steps, 3.0 passes over 67,349 rows, 49 min 10 s, bf16" in text


def test_layers_that_went_are_counted() -> None:
    report = compressed()
    report["compression"]["steps"][3]["removed"]["after"] = {"heads": [12, 12], "neurons": [3072, 3072]}
    step = step_views(view(report))[3]
    assert dict(step.facts)["Layers"] == "2 of 6 left"
    assert step.layers == [("heads", [("12", "")] * 2), ("neurons", [("3,072", "")] * 2)]


def test_the_steps_are_in_the_report_and_not_in_the_manifest() -> None:
    document = compressed()["compression"]
    records = [{"name": step["name"], "record": {**step, "size": {}}} for step in document.pop("steps")]
    manifest = written({}).model_copy(update={"variants": (), "compression": document, "selected": {"overall": INT8}})
    nothing: Any = None
    made_up = Results(
        name="tiny",
        task="custom",
        source=nothing,
        recipe={"parity": {"samples": 1}},
        recorded=Made(nothing, {"data": {}, "dropped_points": []}, ""),
        artifacts=Artifacts(),
        variants=(),
        race={},
        points=(),
        timeline=[],
        origin=nothing,
        compression=Compression(document, {"steps": records}),
    )
    told = assemble_report(made_up, manifest, {})
    assert [step["name"] for step in told["compression"]["steps"]] == [step["name"] for step in records]
    assert "steps" not in (manifest.compression or {})
    assert told["verdict"]["ok"] is True
    assert told["verdict"]["sentence"] == SHIPPED
    document["gate"]["verdict"] = "inconclusive"
    assert assemble_report(made_up, manifest, {})["verdict"]["ok"] is False


def test_steps_for_the_report_are_bounded() -> None:
    losses = [{"step": i, "loss": 1.0 / i} for i in range(1, 5001)]
    record: dict[str, Any] = {
        "kind": "distil",
        "size": {"parameters": 1},
        "training": {"steps": 5000, "losses": losses},
    }
    steps = brief_steps([{"name": "source", "record": {}}, {"name": "1-distil", "record": record}])
    assert [step["name"] for step in steps] == ["1-distil"]
    assert "size" not in steps[0]
    kept = steps[0]["training"]["losses"]
    assert len(kept) == MOST_POINTS
    assert kept[0] == losses[0]
    assert kept[-1] == losses[-1]
    assert len(record["training"]["losses"]) == 5000
    json.dumps(steps)
