"""Students: how they are made, what they learn from, and that nothing of the training stays in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter.errors import RequestError
from exporter.sources import resolve_source
from exporter.structure import layers_of
from exporter.structure.anatomy import linear_weights
from exporter.tasks import get_task
from pipelines.compress.learning import PROJECTIONS, usual_layer_map
from pipelines.compress.models import MODEL, open_trainable
from pipelines.compress.steps import desk as desks
from pipelines.compress.steps import distil as step
from pipelines.compress.steps.desk import open_desk
from pipelines.compress.steps.distil import distil
from pipelines.compress.teacher import answers
from tests.models import make_model
from tests.pipelines.compress.conftest import Teacher
from tests.pipelines.compress.data import arguments, texts, weights_of, write_csv, write_tags

FAST = {"epochs": 4, "learning_rate": 2e-3}
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(teacher: Teacher, train_csv: Path, tmp_path: Path) -> Run:
    """``run(settings)``: a student of the teacher, in ``tmp_path / "out"``."""

    def call(settings: dict[str, Any], **more: Any) -> dict[str, Any]:
        source = more.pop("source", teacher.folder)
        more = {"train": train_csv, "answers": teacher.answers, "teacher": teacher.folder, **more}
        return distil(arguments(source, tmp_path / "out", settings, **more))

    return call


def config_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / MODEL / "config.json").read_text(encoding="utf-8"))
    return found


def losses(record: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in record["training"]["losses"]]


@pytest.mark.parametrize(("layers", "kept"), [(2, [0, 3]), ([1, 2, 3], [1, 2, 3])])
def test_a_student_of_some_of_the_teachers_layers_begins_with_their_weights(
    layers: int | list[int], kept: list[int], teacher: Teacher, train_csv: Path, tmp_path: Path
) -> None:
    asked = arguments(teacher.folder, tmp_path, {"layers": layers}, train=train_csv)
    student, how = step.make_student(open_desk(asked), step.Distil(**asked["step"]))
    assert how["layers"] == kept
    theirs = layers_of(open_trainable(resolve_source(str(teacher.folder)), get_task("text-classification")))
    for mine, number in zip(layers_of(student), kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs[number].parameters(), strict=True))


def test_a_student_of_fewer_layers_learns_and_is_a_plain_folder(run: Run, tmp_path: Path) -> None:
    record = run({"layers": 2, **FAST})
    assert record["size"]["layers"] == 2
    assert config_of(tmp_path / "out")["num_hidden_layers"] == 2
    assert "planish_structure" not in config_of(tmp_path / "out"), "the configuration's own fields can say it"
    assert losses(record)[-1] < 0.9 * losses(record)[0]
    assert record["training"]["loss"] == {"hard": 0.5, "soft": 0.5, "temperature": 2.0}
    import transformers

    loaded, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out" / MODEL, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.config.id2label == {0: "bad", 1: "fair", 2: "good"}


def test_a_narrower_student_learns_hidden_states_through_projections_that_are_gone_afterwards(
    run: Run, tmp_path: Path
) -> None:
    narrow = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
    record = run({"config": narrow, "loss": {"hard": 0, "soft": 0, "hidden": 1.0}, **FAST})
    assert losses(record)[-1] < 0.9 * losses(record)[0]
    assert not [name for name in weights_of(tmp_path / "out") if PROJECTIONS in name]
    assert weights_of(tmp_path / "out")["classifier.weight"].shape == (3, 16)


@pytest.mark.parametrize(
    "term", [{"hard": 1}, {"soft": 1}, {"hidden": 1}, {"attention": 10}, {"relations": 1}, {"cosine": 1}]
)
def test_each_term_alone_makes_its_own_loss_fall_and_leaves_no_trace(
    term: dict[str, float], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    students = []
    make = step.make_student
    monkeypatch.setattr(step, "make_student", lambda *a: students.append(made := make(*a)) or made)
    record = run({"layers": 2, "loss": {"hard": 0, "soft": 0, **term}, **FAST, "epochs": 6, "warmup": 0.3})
    found = losses(record)
    assert found[-1] < 0.9 * found[0], found
    student = students[0][0]
    assert not hasattr(student, PROJECTIONS)
    linear = [module for module in student.modules() if isinstance(module, torch.nn.Linear)]
    assert not [module for module in linear if module._forward_hooks]  # `transformers` has its own on layers
    assert student.config._attn_implementation == "sdpa"
    assert not student.training


def test_a_checkpoint_as_student_keeps_its_own_shape(run: Run, tmp_path: Path) -> None:
    small = make_model("bert-classifier", tmp_path / "small", changes={"num_hidden_layers": 1}, seed=4)
    record = run({"student": str(small), "loss": {"relations": 1.0}, **FAST}, source=small)
    assert record["student"]["made"] == "a checkpoint"
    assert record["size"]["layers"] == 1


def test_answers_are_the_teachers_logits_in_the_order_of_the_data(teacher: Teacher, train_csv: Path) -> None:
    kept = np.load(teacher.answers / "answers.npy")
    asked = arguments(teacher.folder, teacher.answers, {}, train=train_csv)
    desk = open_desk(asked)
    examples = desk.examples(None)
    assert kept.shape == (len(examples), 3)
    with torch.no_grad():
        for number in (0, 17, 303):
            given = {name: torch.tensor(examples[number][name])[None] for name in examples.inputs}
            np.testing.assert_allclose(kept[number], desk.model(**given).logits[0].numpy(), atol=1e-5)


def test_texts_without_labels_are_learned_from_the_teacher_alone(
    run: Run, teacher: Teacher, train_csv: Path, tmp_path: Path
) -> None:
    """Though their file has a column of labels, which are nonsense."""
    more = write_csv(tmp_path / "more.csv", [(text, "no class") for text, _ in texts(60, seed=9)])
    asked = arguments(teacher.folder, tmp_path / "answers", {}, train=train_csv, unlabelled=more)
    told = answers(asked | {"max_length": None})
    assert told["rows"] == 364
    record = run({"layers": 2, **FAST}, unlabelled=more, answers=tmp_path / "answers")
    assert record["training"]["examples"] == 364
    only = run({"layers": 2, **FAST, "loss": {"hard": 0}}, train=None, unlabelled=more, answers=tmp_path / "answers")
    assert only["training"]["examples"] == 60
    assert only["training"]["loss"] == {"soft": 1.0, "temperature": 2.0}


def test_a_sentence_encoders_student_comes_close_to_its_teachers_embeddings(
    tmp_path: Path, planted: Callable[..., Path]
) -> None:
    def livelier(model: Any) -> None:
        """Random weights of the usual size give all texts almost the same embedding."""
        for _, weight in linear_weights(model):
            weight.data.mul_(8)

    plain = make_model("bert", tmp_path / "encoder", changes={"num_hidden_layers": 4})
    encoder = planted(plain, livelier, "feature-extraction")
    data = write_csv(tmp_path / "texts.csv", [(text,) for text, _ in texts(200)], ["text"])
    task = "feature-extraction"
    answers(arguments(encoder, tmp_path / "answers", {}, train=data, task=task) | {"max_length": None})
    asked = arguments(
        encoder, tmp_path / "out", {"layers": 2, "epochs": 10, "learning_rate": 2e-3, "dropout": 0}, train=data,
        task=task, teacher=encoder, answers=tmp_path / "answers",
    )  # fmt: skip
    begun, _ = step.make_student(open_desk(asked), step.Distil(**asked["step"]))
    record = distil(asked)
    assert record["training"]["loss"] == {"temperature": 2.0, "embedding": 1.0}
    assert (tmp_path / "out" / MODEL / "1_Pooling" / "config.json").is_file()
    theirs = np.load(tmp_path / "answers" / "answers.npy")
    distances = []
    for model in (begun, open_trainable(resolve_source(str(tmp_path / "out" / MODEL)), get_task(task))):
        desk = open_desk(asked)
        desk.__dict__["model"] = model
        mine = embed(desk)
        np.testing.assert_allclose(np.linalg.norm(mine, axis=1), 1.0, atol=1e-4)
        distances.append(float(np.square(mine - theirs).sum(axis=1).mean()))
    assert distances[1] < 0.3 * distances[0], distances


def embed(desk: desks.Desk) -> np.ndarray:
    from pipelines.compress.examples import collator

    examples, pool = desk.examples(None), desk.pool()
    batch = collator(desk.pad)([examples[i] for i in range(len(examples))])
    with torch.no_grad():
        states = desk.model.eval()(**{name: batch[name] for name in examples.inputs}).last_hidden_state
        found: np.ndarray = pool(states, batch["attention_mask"]).numpy()
    return found


def test_soft_targets_of_tokens_meet_their_own_tokens(tmp_path: Path) -> None:
    """A student that is its teacher has nothing to learn: any answer that met another token would cost."""
    model = make_model("mpnet", tmp_path / "model")
    data = write_tags(tmp_path / "train.jsonl", 60)
    task = "token-classification"
    answers(arguments(model, tmp_path / "answers", {}, train=data, task=task) | {"max_length": None})
    settings = {
        "student": str(model), "loss": {"hard": 0, "soft": 1}, "max_steps": 1, "dropout": 0, "learning_rate": 1e-12,
        "micro_batch": 8,
    }  # fmt: skip
    asked = arguments(
        model, tmp_path / "out", settings, train=data, task=task, teacher=model, answers=tmp_path / "answers"
    )
    seen: list[float] = []
    from pipelines.compress import objectives

    original = objectives.soft_targets

    def watched(*given: Any) -> Any:
        loss = original(*given)
        seen.append(float(loss.detach()) / float((given[2] != -100).sum()))
        return loss

    objectives.soft_targets = watched
    try:
        distil(asked)
    finally:
        objectives.soft_targets = original
    assert len(seen) == 4
    assert max(map(abs, seen)) < 1e-6


@pytest.mark.parametrize("term", ["hidden", "attention", "relations", "cosine"])
def test_states_of_pictures_are_matched_too(term: str, tmp_path: Path) -> None:
    from PIL import Image

    for number in range(12):
        Image.new("RGB", (32, 32), (number * 20, 90, 255 - number * 20)).save(tmp_path / f"{number}.png")
    data = write_csv(tmp_path / "train.csv", [(f"{n}.png", ("bad", "fair", "good")[n % 3]) for n in range(12)],
                     ["image", "label"])  # fmt: skip
    model = make_model("vit", tmp_path / "vit")
    settings = {"layers": 1, "loss": {"hard": 0, "soft": 0, term: 1.0}, "epochs": 10, "learning_rate": 1e-3}
    record = distil(
        arguments(model, tmp_path / "out", settings, train=data, task="image-classification", teacher=model)
    )
    assert record["training"]["steps"] == 10
    assert record["training"]["losses"] == [] or record["training"]["losses"][-1]["loss"] > 0


def test_a_new_student_of_a_pruned_teacher_is_built_as_its_configuration_says(
    planted: Callable[..., Path], teacher: Teacher, train_csv: Path, tmp_path: Path
) -> None:
    from exporter.structure import remove_heads

    pruned = planted(teacher.folder, lambda model: remove_heads(model, 1, [0]))
    asked = arguments(
        pruned, tmp_path / "out", {"config": {"num_hidden_layers": 2}, "max_steps": 1, "loss": {"soft": 0}},
        train=train_csv, teacher=pruned, answers=teacher.answers,
    )  # fmt: skip
    record = distil(asked)
    assert record["size"]["layer_structure"]["heads"] == [4, 4]
    open_trainable(resolve_source(str(tmp_path / "out" / MODEL)), get_task("text-classification"))


@pytest.mark.parametrize(
    ("settings", "what", "value"),
    [
        ({"layers": 5}, "the model has not so many layers", "5"),
        ({"layers": [0, 7]}, "not layers to keep", "[0, 7]"),
        ({"layers": [2, 1]}, "not layers to keep", "[2, 1]"),
        ({"config": {"depth": 3}}, "the model's configuration has no such field", "depth"),
        ({"config": {"hidden_size": 30}}, "the student's configuration is none", "30"),
        ({"config": {"vocab_size": 50}}, "the student's configuration cannot change this", "vocab_size"),
        (
            {"config": {"hidden_size": 16}, "loss": {"cosine": 1}},
            "the direction of hidden states needs equal widths",
            "32 and 16",
        ),
        ({"layers": 2, "loss": {"embedding": 1}}, "only sentence encoders have embeddings", "text-classification"),
    ],
)
def test_students_that_cannot_be(settings: dict[str, Any], what: str, value: str, run: Run) -> None:
    with pytest.raises(RequestError) as caught:
        run(settings)
    assert what in caught.value.what
    assert value in str(caught.value.value)
    assert caught.value.remedy


def test_the_layers_that_a_student_learns_from_are_evenly_apart() -> None:
    assert usual_layer_map(3, 6) == [1, 3, 5]
    assert usual_layer_map(6, 6) == [0, 1, 2, 3, 4, 5]
    assert usual_layer_map(1, 12) == [11]
    assert usual_layer_map(6, 3)[-1] == 2


def test_inner_states_are_learned_the_same_when_activations_are_computed_again(run: Run, tmp_path: Path) -> None:
    from tests.pipelines.compress.data import apart

    found = []
    for again in (False, True):
        loss = {"hard": 0, "soft": 0, "relations": 1, "hidden": 0.1}
        run({"layers": 2, "loss": loss, "max_steps": 6, "dropout": 0, "gradient_checkpointing": again})
        found.append(weights_of(tmp_path / "out"))
    assert apart(*found) < 1e-6
