"""A recipe of two steps, from a bare encoder to a bundle; again from the cache; and a student that lost too much."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from pipelines.bundle import Bundle
from pipelines.checking import verify
from pipelines.compress.command import compress_recipe
from pipelines.compress.summary import gate
from pipelines.recipe import load_recipe, recipe_digest
from pipelines.runner import outcome, run
from tests.pipelines.compress.data import texts, write_csv

pytestmark = pytest.mark.slow
STEPS: list[dict[str, Any]] = [
    {"finetune": {"epochs": 10, "learning_rate": 3e-3}},
    {"distil": {"layers": 1, "epochs": 4, "learning_rate": 2e-3}},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with data, and a cache of its own."""
    folder = tmp_path_factory.mktemp("whole")
    write_csv(folder / "train.csv", texts(304))
    write_csv(folder / "test.csv", texts(90, seed=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLANISH_CACHE", str(folder / "cache"))
        yield folder


def recipe_of(place: Path, model: Path, **compress: Any) -> Path:
    recipe = {
        "source": str(model),
        "task": "text-classification",
        "name": "small",
        "data": {"evaluation": "test.csv"},
        "targets": ["onnxruntime-cpu"],
        "precisions": ["fp32"],
        "threads": 1,
        "parity": {"samples": 4},
        "compress": {"data": "train.csv", "steps": STEPS, "max_drop": 20.0, **compress},
        "latency": {"points": ["1x16"], "budget_s": 1.0, "min_block_ms": 5.0, "baselines": ["eager"]},
    }
    path = place / f"recipe-{len(list(place.glob('recipe-*')))}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def bundle(place: Path, model_folder: Callable[..., Path]) -> Any:
    recipe = load_recipe(recipe_of(place, model_folder("bert-plain")))
    return run(recipe, out=place / "bundle")


def trained(bundle: Any) -> list[str]:
    """The stages that were run, not found, by their titles."""
    timeline = (
        bundle.manifest.model_dump(mode="json").get("timeline")
        or json.loads((bundle.path / "report.json").read_text(encoding="utf-8"))["timeline"]
    )
    return [entry["title"] for entry in timeline if not entry["cached"]]


def test_the_bundle_tells_of_every_model_on_the_way(bundle: Any) -> None:
    assert outcome(bundle) is None
    told = bundle.manifest.compression
    assert [hop["kind"] for hop in told["hops"]] == ["finetune", "distil"]
    assert told["teacher"] == "1-finetune"
    assert told["labelled"]
    assert told["rows"] == 90
    teacher, student = told["hops"]
    assert teacher["size"]["layers"] == 2
    assert student["size"]["layers"] == 1
    assert student["size"]["bytes"] < teacher["size"]["bytes"]
    assert student["quality"]["original"] > 0.9, "the teacher's"
    for hop in told["hops"]:
        assert set(hop["speed"]) >= {"onnxruntime-cpu-fp32"}, hop["name"]
    assert told["gate"]["verdict"] in ("passed", "inconclusive")
    assert set(told["selected"]) == {"onnxruntime-cpu-fp32"}
    assert bundle.manifest.source.digest != student["digest"]


def test_a_second_run_trains_nothing(bundle: Any, place: Path, model_folder: Callable[..., Path]) -> None:
    assert [title for title in trained(bundle) if title.startswith("Distil")], "the first run did"
    recipe = load_recipe(recipe_of(place, model_folder("bert-plain")))
    again = run(recipe, out=place / "again")
    assert not [title for title in trained(again) if title.startswith(("Fine", "Distil", "Prune", "Share", "Ask"))]
    assert [hop["digest"] for hop in again.manifest.compression["hops"]] == [
        hop["digest"] for hop in bundle.manifest.compression["hops"]
    ]
    assert not list((place / "cache").rglob("checkpoint-*")), "checkpoints are gone when the result is safe"


def test_the_digest_of_a_recipe_is_that_of_its_steps(place: Path, model_folder: Callable[..., Path]) -> None:
    def digest(**changed: Any) -> str:
        steps = [
            {name: {**asked, **changed} if name == "distil" else asked for name, asked in s.items()} for s in STEPS
        ]
        return recipe_digest(load_recipe(recipe_of(place, model_folder("bert-plain"), steps=steps)).resolved())

    assert digest() == digest()
    assert digest() != digest(learning_rate=1e-3)
    assert digest() != digest(loss={"temperature": 3.0})


def test_a_student_that_lost_too_much_is_not_to_be_shipped(bundle: Any) -> None:
    told = bundle.manifest.compression
    record = {**told["hops"][-1]["quality"], "max_drop": 0.0, "max_drop_worst": 0.0}
    for verdict, ships in (("passed", True), ("failed", False), ("inconclusive", False), ("skipped", True)):
        quality = {
            "labelled": verdict != "skipped",
            "models": {told["hops"][-1]["name"]: record | {"verdict": verdict}},
        }
        judged = gate(quality, SimpleNamespace(hops=[SimpleNamespace(name=told["hops"][-1]["name"])]))
        assert judged["verdict"] == verdict
        changed = bundle.manifest.model_copy(update={"compression": {**told, "gate": judged}})
        error = outcome(Bundle(bundle.path, changed))
        assert (error is None) == ships, verdict
        if error is not None:
            assert str(error).startswith(f"compression lost more than compress.max_drop allows: {verdict}: ")
            assert error.exit_status == 1


def test_verify_compares_with_the_model_that_was_exported(
    bundle: Any, place: Path, model_folder: Callable[..., Path]
) -> None:
    recipe = load_recipe(recipe_of(place, model_folder("bert-plain")))
    compress_recipe(recipe, place / "student")  # from the cache
    same = verify(bundle, against=str(place / "student"), latency=False)
    assert same.ok, same.to_dict()
    assert same.source is not None
    assert same.source["verdict"] == "passed"
    before = verify(bundle, against=str(model_folder("bert-plain")), latency=False)
    assert before.source is not None
    assert before.source["verdict"] == "failed"
    assert "is what compression began with" in before.source["reason"]
