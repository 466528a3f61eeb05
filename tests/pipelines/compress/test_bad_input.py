"""Wrong recipes, data and teachers: what happened, the value, what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from calibration.datasets import load_task_dataset
from exporter.errors import PlanishError, RequestError
from exporter.sources import resolve_source
from exporter.tasks import get_task
from pipelines.compress.examples import label_names
from pipelines.compress.learning import Terms
from pipelines.compress.models import add_head, needs_head, refuse_other_order
from pipelines.compress.sections import Compress, Loss, Prune
from pipelines.compress.steps.distil import distil
from pipelines.compress.steps.finetune import finetune
from pipelines.recipe import Recipe
from tests.models import make_model
from tests.pipelines.compress.conftest import Teacher
from tests.pipelines.compress.data import arguments, texts, write_csv

RECIPES: list[tuple[dict[str, Any], str, str, str]] = [
    (
        {"steps": [{"prune": {"sparsity": 1.0}}]},
        "compress.steps.0.prune.sparsity", "1.0", "less than 1",
    ),
    (
        {"steps": [{"prune": {"sparsity": 0.5, "heads": 0.5}}], "data": "t.csv"},
        "a pruning step does one thing", "sparsity, heads, neurons or layers", "Give one of: sparsity, pattern, heads",
    ),
    (
        {"steps": [{"prune": {}}]},
        "a pruning step does one thing", "nothing", "Give one of",
    ),
    (
        {"steps": [{"prune": {"sparsity": 0.5, "gradual": 3}}]},
        "gradual pruning sets weights to zero while it trains", "3", "Add recover",
    ),
    (
        {"steps": [{"finetune": {"early_stopping": 2}}], "data": "t.csv"},
        "early stopping needs data to judge by", "2", "Give compress.validation",
    ),
    (
        {"steps": [{"distil": {}}], "data": "t.csv"},
        "the student would be its own teacher", "no layers", "Give layers, config, student or teacher",
    ),
    (
        {"steps": [{"distil": {"layers": 2, "config": {"hidden_size": 8}}}], "data": "t.csv"},
        "the student is described more than once", "layers, config", "Keep one of them",
    ),
    (
        {"steps": [{"finetune": {}, "distil": {"layers": 1}}], "data": "t.csv"},
        "not a step", "finetune, distil", "one of finetune, distil, prune and share",
    ),
    (
        {"steps": [{"quantise": {}}], "data": "t.csv"},
        "quantise", "", "",
    ),
    (
        {"steps": [{"finetune": {"learning_rat": 1e-3}}], "data": "t.csv"},
        "learning_rat", "", "learning_rate",
    ),
    (
        {"steps": [{"finetune": {"batch_size": 32, "micro_batch": 5}}], "data": "t.csv"},
        "does not divide the batch", "5", "It must divide batch_size, 32",
    ),
    (
        {"steps": [{"share": {}}]},
        "there is nothing to share", "no key", "Give layers, embeddings or clusters",
    ),
    (
        {"steps": [{"distil": {"layers": 2}}]},
        "a step trains, and there is no data", "distil", "Give compress.data",
    ),
    (
        {"steps": [{"finetune": {}}], "unlabelled": "t.csv"},
        "finetune needs labelled data", "only unlabelled", "Give compress.data",
    ),
    (
        {"steps": [{"prune": {"heads": 0.5}}]},
        "a step measures importance, and there is no data", "prune", "Give compress.data",
    ),
    (
        {"steps": [{"distil": {"layers": 1, "loss": {"hard": 0, "soft": 0, "embedding": 0}}}], "data": "t.csv"},
        "there is nothing to learn from", "0", "Give one of the terms a weight above 0",
    ),
    (
        {"steps": [{"prune": {"heads": 0.5, "recover": {"teacher": False, "loss": {"soft": 0.7, "cosine": 1}}}}],
         "data": "t.csv"},
        "there is no teacher to learn this from", "soft, cosine", "Set teacher to true",
    ),
    (
        {"steps": ["finetune"], "data": "t.csv", "max_drop": 3, "max_drop_worst": 1},
        "out of range", "1", "at least max_drop, 3.0",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("section", "what", "value", "remedy"), RECIPES, ids=[case[1][:40] for case in RECIPES])
def test_recipes_that_cannot_be_name_key_value_and_remedy(
    section: dict[str, Any], what: str, value: str, remedy: str, tmp_path: Path
) -> None:
    import yaml

    from pipelines.recipe import load_recipe

    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"source": "m", "task": "text-classification", "compress": section}))
    with pytest.raises(RequestError) as caught:
        load_recipe(path)
    told = str(caught.value)
    assert what in told, told
    assert value in told, told
    assert remedy in told, told
    assert "compress" in told, told
    assert "pydantic" not in told, told


def test_a_step_may_be_named_alone() -> None:
    steps = Compress(steps=["finetune", {"finetune": None}], data="t.csv").steps
    assert steps[0] == steps[1]
    assert steps[0].kind == "finetune"


Refused = Callable[..., PlanishError]


@pytest.fixture
def refused(untrained: Path, tmp_path: Path) -> Refused:
    """``refused(rows)``: what fine-tuning on them raises."""

    def call(rows: list[tuple[str, str]], **more: Any) -> PlanishError:
        data = write_csv(tmp_path / "bad.csv", rows)
        with pytest.raises(RequestError) as caught:
            finetune(arguments(untrained, tmp_path, {"max_steps": 1}, train=data, **more))
        assert not (tmp_path / "model").exists()
        return caught.value

    return call


def test_a_label_outside_the_configuration(refused: Refused) -> None:
    error = refused([*texts(30), ("so so", "middling")])
    assert str(error) == "the model has no class of that name: middling. It has: bad, fair, good"


def test_a_number_outside_the_configuration(refused: Refused) -> None:
    error = refused([("a text", str(number)) for number in (0, 1, 2, 3)])
    assert "has no class of that number: 3. It has classes 0 to 2" in str(error)


def test_a_class_that_the_training_data_lack(refused: Refused) -> None:
    error = refused([row for row in texts(30) if row[1] != "fair"])
    assert str(error).startswith("a class is missing from the training data: fair. Add rows of it")


def test_validation_data_without_labels(refused: Refused, tmp_path: Path) -> None:
    bare = write_csv(tmp_path / "bare.csv", [(text,) for text, _ in texts(10)], ["text"])
    error = refused(texts(30), validation=bare)
    assert str(error) == (
        "the validation data have no labels: bare.csv has text. Name their column with compress.columns"
    )


def test_training_data_without_labels(untrained: Path, tmp_path: Path) -> None:
    bare = write_csv(tmp_path / "bare.csv", [(text,) for text, _ in texts(10)], ["text"])
    with pytest.raises(RequestError, match=r"there are no labels to learn from: compress.data"):
        finetune(arguments(untrained, tmp_path, {"max_steps": 1}, train=bare))


def names_of(tmp_path: Path, rows: list[tuple[str, Any]], given: tuple[str, ...]) -> tuple[str, ...]:
    return label_names(load_task_dataset("text-classification", write_csv(tmp_path / "l.csv", rows)), given)


def test_names_of_a_new_head(tmp_path: Path) -> None:
    rows = texts(9)
    assert names_of(tmp_path, rows, ()) == ("bad", "fair", "good")
    assert names_of(tmp_path, rows, ("good", "fair", "bad")) == ("good", "fair", "bad")
    assert names_of(tmp_path, [("a", 2), ("b", 0), ("c", 10)], ()) == ("0", "2", "10")
    assert names_of(tmp_path, [("a", 1), ("b", 0)], ("no", "yes")) == ("no", "yes")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("bad", "good"), "a label of the training data is no class: 'fair' in row 2. Add it to compress.labels, which "
         "has bad, good, or mend the data"),
        (("bad", "fair", "good", "best"), "a class is missing from the training data: best. Add rows of it, or take it "
         "out of compress.labels"),
    ],
)  # fmt: skip
def test_labels_that_the_data_do_not_have(given: tuple[str, ...], told: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        names_of(tmp_path, texts(9), given)
    assert str(caught.value).startswith(told)


def test_data_of_one_class(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"the training data have one class only: good. Give at least two"):
        names_of(tmp_path, [("a", "good"), ("b", "good")], ())


def test_labels_in_another_order_than_the_sources_classes(untrained: Path) -> None:
    source, task = resolve_source(str(untrained)), get_task("text-classification")
    assert not needs_head(source, task, ("bad", "fair", "good"))
    assert needs_head(source, task, ("no", "yes"))
    with pytest.raises(
        RequestError, match=r"another order.*good, fair, bad. Give compress.labels in the model's order"
    ):
        needs_head(source, task, ("good", "fair", "bad"))
    refuse_other_order(source, ("bad", "fair", "good"))
    refuse_other_order(source, ())
    with pytest.raises(RequestError, match=r"another order"):
        refuse_other_order(source, ("good", "fair", "bad"))


@pytest.mark.parametrize("loss", [{"hard": 0, "soft": 0}, {"hard": 0, "soft": 0, "embedding": 0}], ids=str)
def test_a_loss_of_no_term_is_refused_for_the_task(loss: dict[str, float]) -> None:
    fields = {name: value for name, value in loss.items() if name != "embedding"}
    with pytest.raises(RequestError, match=r"nothing to learn from: loss: hard, soft 0"):
        Terms.of(Loss(**fields), "text-classification", labelled=True, teacher=True)


def test_two_four_without_quotes_is_what_yaml_makes_of_it() -> None:
    assert yaml.safe_load("pattern: 2:4") == {"pattern": 124}
    assert Prune(**yaml.safe_load("pattern: 2:4")).pattern == "2:4"
    with pytest.raises(ValueError):
        Prune(pattern=125)


def test_a_head_for_a_bare_encoder(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    task = get_task("text-classification")
    source = resolve_source(str(model_folder("bert")))
    made = add_head(source, task, ("no", "yes"), tmp_path / "one", seed=1)
    assert not (tmp_path / "one" / "modules.json").exists(), "no sentence encoder any more"
    assert not needs_head(made, task, ("no", "yes"))
    first = (tmp_path / "one" / "model.safetensors").read_bytes()
    for name, seed in (("again", 1), ("other", 2)):
        add_head(source, task, ("no", "yes"), tmp_path / name, seed=seed)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == first
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != first


def student_of(changes: dict[str, Any] | None, tmp_path: Path, **more: Any) -> Path:
    return make_model(
        "bert-classifier", tmp_path / "student", changes={"num_hidden_layers": 1, **(changes or {})}, **more
    )


def refusal(student: Path, teacher: Teacher, train_csv: Path, tmp_path: Path) -> str:
    step = {"student": str(student), "max_steps": 1}
    asked = arguments(student, tmp_path / "out", step, train=train_csv, teacher=teacher.folder, answers=teacher.answers)
    with pytest.raises(RequestError) as caught:
        distil(asked)
    return str(caught.value)


def labels_of(*names: str) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def test_a_teacher_with_its_classes_in_another_order(teacher: Teacher, train_csv: Path, tmp_path: Path) -> None:
    told = refusal(student_of(labels_of("good", "bad", "fair"), tmp_path), teacher, train_csv, tmp_path)
    assert told.startswith(
        "teacher and student have their classes in different orders: teacher bad, fair, good; student good, bad, fair. "
        "Give the student the teacher's order, label2id: {'bad': 0, 'fair': 1, 'good': 2}, "
        "or compress.labels: [bad, fair, good]"
    )


def test_a_teacher_with_other_classes(teacher: Teacher, train_csv: Path, tmp_path: Path) -> None:
    rows = [(text, {"fair": "bad"}.get(label, label)) for text, label in texts(30)]
    two = write_csv(tmp_path / "two.csv", rows)
    told = refusal(student_of(labels_of("bad", "good"), tmp_path), teacher, two, tmp_path)
    assert told == (
        "teacher and student have different classes: teacher bad, fair, good; student bad, good. Train a teacher with "
        "the student's classes, or give the student these: [bad, fair, good]"
    )


def test_a_teacher_with_other_classes_can_be_asked_all_the_same(teacher: Teacher, tmp_path: Path) -> None:
    """What does not go together is told by the step, not by the stage that asks the teacher."""
    from pipelines.compress.teacher import answers

    data = write_csv(tmp_path / "t.csv", [("a text", "red"), ("another", "blue")])
    assert answers(arguments(teacher.folder, tmp_path, {}, train=data) | {"max_length": None})["rows"] == 2


def test_a_teacher_with_another_tokenizer(teacher: Teacher, train_csv: Path, tmp_path: Path) -> None:
    import json

    student = student_of(None, tmp_path)
    path = student / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    ids = tokenizer["model"]["vocab"]
    for word in ("good", "where", "old"):  # other pieces in their places
        ids[f"##{word}"] = ids.pop(word)
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    told = refusal(student, teacher, train_csv, tmp_path)
    assert told.startswith("teacher and student have different tokenizers: '")
    assert "tokens are the same" in told
    assert told.endswith(
        "Make the student from the teacher (distil.layers, distil.config), or give it the teacher's tokenizer"
    )


def test_what_is_no_model_folder_cannot_be_compressed() -> None:
    from pipelines.compress.models import open_trainable

    with pytest.raises(RequestError, match=r"only Hugging Face model folders can be compressed: tests.models:conv"):
        open_trainable(resolve_source("tests.models:conv_factory"), get_task("image-classification"))


def test_the_resolved_recipe_says_every_default() -> None:
    recipe = Recipe(source="m", compress={"steps": ["finetune"], "data": "t.csv"})
    (step,) = recipe.compress.steps
    assert step.training is not None
    assert step.training.batch_size == 32
