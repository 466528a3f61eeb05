"""Models that answer questions: what they learn of labels and of a teacher, and what of them can be pruned."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional

from calibration.datasets import load_task_dataset
from calibration.roles import Answer
from exporter.encoders.text import TextEncoder
from exporter.errors import RequestError
from exporter.sources import resolve_source
from exporter.tasks import get_task
from pipelines.compress import objectives
from pipelines.compress.command import compress_recipe
from pipelines.compress.examples import COUNTED, TARGET, _characters, collator, encode_examples
from pipelines.compress.learning import Answers, Lesson, Terms
from pipelines.compress.models import MODEL, open_trainable
from pipelines.compress.steps.desk import encoder_of, open_desk
from pipelines.compress.steps.distil import distil
from pipelines.compress.steps.finetune import finetune
from pipelines.compress.steps.prune import importance, prune
from pipelines.compress.teacher import ANSWERS, answers
from pipelines.recipe import load_recipe
from pipelines.verification.encode import encode_rows
from pipelines.verification.predict import metric_arguments, run_predictions
from tests.models import make_model
from tests.pipelines.compress.data import arguments, texts, write_csv, write_questions

TASK = "question-answering"
FAST = {"epochs": 6, "learning_rate": 3e-3}
NEW = {"n_layers": 1, "hidden_dim": 32}
"""A student that begins with none of the teacher's weights."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    make_model("distilbert", folder / "untrained", changes={"n_layers": 3})
    write_questions(folder / "train.jsonl", 320)
    write_questions(folder / "test.jsonl", 60, seed=1)
    return folder


class Taught(NamedTuple):
    """A trained model, and its answers to the training data."""

    folder: Path
    answers: Path
    losses: list[float]


@pytest.fixture(scope="module")
def taught(place: Path) -> Taught:
    train = place / "train.jsonl"
    asked = arguments(place / "untrained", place / "teacher", FAST, train=train, validation=train, task=TASK)
    record = finetune(asked)
    answers(arguments(place / "teacher" / MODEL, place / "said", {}, train=train, task=TASK) | {"max_length": None})
    return Taught(place / "teacher" / MODEL, place / "said", losses(record))


def losses(record: Mapping[str, Any]) -> list[float]:
    return [entry["loss"] for entry in record["training"]["losses"]]


def exact(folder: Path, data: Path) -> float:
    """The share of questions that a model answers exactly, by what verification does with its outputs."""
    source = resolve_source(str(folder))
    model = open_trainable(source, get_task(TASK)).eval()
    rows = list(load_task_dataset(TASK, data))
    batches = encode_rows(TASK, encoder_of(source, get_task(TASK)), rows)

    def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.no_grad():
            found = model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        return {name: found[name].numpy() for name in ("start_logits", "end_logits")}

    said, wanted = metric_arguments(TASK, run_predictions(TASK, batches, run), rows)
    return float(np.mean([answer in right for answer, right in zip(said, wanted, strict=True)]))


@pytest.fixture(scope="module")
def encoded(place: Path) -> Callable[..., Any]:
    """``encoded(context, answers, max_length)``: the example of one question, and the text between its targets."""
    encoder = encoder_of(resolve_source(str(place / "untrained")), get_task(TASK))

    def encode(context: str, given: Any, max_length: int | None = None) -> tuple[Any, str | None]:
        path = place / "one.jsonl"
        row = {"question": "where is it", "context": context, "answers": given}
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        (row,) = load_task_dataset(TASK, path)
        (example,) = encode_examples(TASK, encoder, [row], max_length=max_length).items
        first, last = example[TARGET]
        if first < 0:
            assert last == first
            return example, None
        offsets = encoder.encode_with_offsets([row["question"]], [context]).offsets[0]
        return example, context[offsets[first, 0] : offsets[last, 1]]

    return encode


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([{"text": "old city", "answer_start": 4}], "old city"),
        ("river", "river"),
        ([" river "], "river"),
        ({"text": ["big river", "old"], "answer_start": [20, 4]}, "big river"),
        (["nowhere", "old"], "old"),
        ([], None),
        (["nowhere"], None),
        ([""], None),
    ],
)
def test_targets_are_the_tokens_of_the_first_answer_that_is_there(
    given: Any, wanted: str | None, encoded: Callable[..., Any]
) -> None:
    example, found = encoded("the old city and the big river", given)
    assert found == wanted
    assert example[COUNTED] == 0, "a teacher's answer is learned all the same"


@pytest.mark.parametrize("answer", ["cafe\u0301", "old\u200b", "city\u00ad"])
@pytest.mark.parametrize("after", ["", " and the river"])
def test_what_a_tokenizer_leaves_out_of_an_answer_is_not_cut_off(
    answer: str, after: str, encoded: Callable[..., Any]
) -> None:
    found = encoded(f"the big {answer}{after}", [answer])[1]
    assert found is not None
    assert answer.startswith(found)
    assert len(answer) - len(found) <= 1


def test_an_answer_is_not_cut_off_where_its_context_goes_on(encoded: Callable[..., Any]) -> None:
    """The tokenizer leaves out a sign that is no mark."""
    assert encoded("the big old\ufffd and the river", ["old\ufffd"])[1] == "old"
    assert encoded("the river and \ufffdold city", ["\ufffdold"])[1] == "old"


def test_of_several_places_the_one_that_the_data_name_is_meant(encoded: Callable[..., Any]) -> None:
    context = "river and river and river"
    places = {
        start: encoded(context, [{"text": "river", "answer_start": start}])[0][TARGET][0] for start in (0, 10, 20)
    }
    assert list(np.diff(list(places.values()))) == [2, 2]
    assert encoded(context, [{"text": "river", "answer_start": 11}])[0][TARGET][0] == places[10], "it is a little off"
    assert encoded(context, ["river"])[0][TARGET][0] == places[0]


@pytest.mark.parametrize(
    ("answer", "context", "span"),
    [
        (Answer("na na", 3), "na na na", (3, 8)),
        (Answer("1 1", 2), "1 1 1", (2, 5)),
        ("art", "the party of art", (13, 16)),
        (Answer("art", 5), "the party of art", (5, 8)),
        ("art", "the party", (5, 8)),
        ("(art)", "of (art).", (3, 8)),
        ("", "no answer", None),
        (" ", "no answer", None),
        ("Art", "of art", None),
    ],
)
def test_where_an_answer_is_found(answer: str, context: str, span: tuple[int, int] | None) -> None:
    assert _characters(answer, context) == span


def test_an_answer_that_is_cut_off_or_only_in_the_question_is_none(encoded: Callable[..., Any]) -> None:
    context = "the old city and the big river"
    full = encoded(context, ["big river"])[0]
    assert full[TARGET][1] == len(full["input_ids"]) - 2
    assert encoded(context, ["big river"], max_length=len(full["input_ids"]))[1] == "big river"
    assert encoded(context, ["big river"], max_length=len(full["input_ids"]) - 1)[1] is None
    assert encoded(context, ["where"])[1] is None


def test_targets_of_real_questions_are_their_answers(shared: Path, minilm: str) -> None:
    """1,190 of them, of which 127 have answers that stand in several places of their paragraph."""
    import importlib.util

    rows = list(load_task_dataset(TASK, shared / "data" / "xquad" / "xquad.en.json"))
    spec = importlib.util.find_spec(minilm.partition(":")[0])
    assert spec is not None
    folder = Path(str(spec.origin)).parent / "model"
    encoder = TextEncoder.load(folder, inputs=("input_ids", "attention_mask"), limit=512, truncation="only_second")
    right = cut = 0
    for row, example in zip(rows, encode_examples(TASK, encoder, rows).items, strict=True):
        (first, last), (answer,) = example[TARGET], row["answers"]
        offsets = encoder.encode_with_offsets([row["question"]], [row["context"]]).offsets[0]
        start, end = offsets[first, 0], offsets[last, 1]
        cut += bool(first < 0)
        right += bool(first >= 0 and (start, row["context"][start:end]) == (answer.start, answer))
    assert (right, cut) == (1171, 18), "one ends within a token"


def test_start_and_end_are_choices_between_the_tokens_of_a_row() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    start, end = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(0)).unbind(1)
    outputs = {"start_logits": start, "end_logits": end}

    class Outputs(dict[str, Any]):
        __getattr__ = dict.__getitem__

    logits = objectives.logits_of(Outputs(outputs), mask)
    target = objectives.placed(torch.tensor([[0, 2], [1, -100]]), outputs, mask)
    assert target.tolist() == [[0, 2], [3, -100]]
    by_hand = functional.cross_entropy(start[0, :3], torch.tensor(0)) + functional.cross_entropy(
        end[0, :3], torch.tensor(2)
    )
    by_hand += functional.cross_entropy(start[1, 2:], torch.tensor(1))
    assert float(objectives.hard_targets(logits, target)) == pytest.approx(float(by_hand), rel=1e-6)
    counted = torch.zeros(2, 2, dtype=torch.int64)
    assert float(objectives.soft_targets(logits, logits, counted, 2.0)) == 0
    other = objectives.choices(torch.stack([end, start], dim=-1), mask)
    assert 0 < float(objectives.soft_targets(logits, other, counted, 2.0)) < 100, "padding adds nothing"


def test_a_lesson_is_the_mean_over_start_and_end_of_labels_and_teacher(taught: Taught, place: Path) -> None:
    desk = open_desk(arguments(taught.folder, place / "desk", {}, train=place / "train.jsonl", task=TASK))
    examples, rows = desk.examples(None), [0, 7, 19]
    batch = collator(desk.pad)([examples[i] for i in rows])
    inputs = {name: batch[name] for name in examples.inputs}
    said = np.load(taught.answers / ANSWERS)
    lesson = Lesson(Terms(hard=0.3, soft=0.7, temperature=3.0), Answers(said))
    student = open_trainable(resolve_source(str(place / "untrained")), get_task(TASK)).eval()
    with torch.no_grad():
        total, _ = lesson(student, batch, inputs)
        by_hand = 0.0
        for row in rows:
            one = {name: torch.as_tensor(np.array([examples[row][name]])) for name in examples.inputs}
            outputs = student(**one)
            for number, name in enumerate(("start_logits", "end_logits")):
                mine = outputs[name][0]
                theirs = torch.from_numpy(said[row, : len(mine), number])
                by_hand += 0.3 * float(functional.cross_entropy(mine, torch.tensor(examples[row][TARGET][number]))) / 2
                kept = functional.kl_div(
                    (mine / 3).log_softmax(-1), (theirs / 3).log_softmax(-1), log_target=True, reduction="sum"
                )
                by_hand += 0.7 * 9 * float(kept) / 2
    assert float(total) == pytest.approx(by_hand, rel=1e-4)


def test_a_model_learns_from_answers_and_a_student_from_it(taught: Taught, place: Path, tmp_path: Path) -> None:
    assert taught.losses[-1] < 0.5 * taught.losses[0]
    assert exact(taught.folder, place / "test.jsonl") > 0.8
    step = {"config": NEW, "loss": {"hard": 0.2, "soft": 0.8}, **FAST}
    asked = {"train": place / "train.jsonl", "task": TASK, "teacher": taught.folder, "answers": taught.answers}
    record = distil(arguments(taught.folder, tmp_path, step, **asked))
    assert record["training"]["loss"] == {"hard": 0.2, "soft": 0.8, "temperature": 2.0}
    assert losses(record)[-1] < 0.5 * losses(record)[0]
    assert exact(tmp_path / MODEL, place / "test.jsonl") > 0.8


def test_a_student_learns_from_the_teacher_alone(taught: Taught, place: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (place / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    bare = tmp_path / "bare.jsonl"
    bare.write_text("".join(json.dumps({k: row[k] for k in ("question", "context")}) + "\n" for row in rows))
    asked = {"unlabelled": bare, "task": TASK, "teacher": taught.folder, "answers": taught.answers}
    record = distil(arguments(taught.folder, tmp_path, {"config": NEW, **FAST}, **asked))
    assert record["training"]["loss"] == {"soft": 1.0, "temperature": 2.0}
    assert exact(tmp_path / MODEL, place / "test.jsonl") > 0.8


def test_heads_and_neurons_are_pruned_by_what_the_answers_lose(taught: Taught, place: Path, tmp_path: Path) -> None:
    asked = arguments(taught.folder, tmp_path / "look", {}, train=place / "train.jsonl", task=TASK)
    found = importance(open_desk(asked), 64)
    assert all(bool((scores > 0).any()) for scores in (*found.heads, *found.neurons))
    step = {"heads": 0.5, "neurons": 0.5, "recover": {"epochs": 3, "learning_rate": 2e-3}}
    asked = {"train": place / "train.jsonl", "task": TASK, "teacher": taught.folder, "answers": taught.answers}
    record = prune(arguments(taught.folder, tmp_path / "out", step, **asked))
    assert sum(record["removed"]["after"]["heads"]) == 6
    assert exact(tmp_path / "out" / MODEL, place / "test.jsonl") > 0.8


def test_a_teachers_answers_are_refused_where_they_belong_to_other_tokens(
    taught: Taught, place: Path, tmp_path: Path
) -> None:
    """Rare words are cut into more pieces than the teacher has."""
    asked = {"train": place / "train.jsonl", "task": TASK, "teacher": taught.folder, "answers": taught.answers}
    step = {"vocabulary": True, "min_count": 600, "recover": {"max_steps": 2}}
    with pytest.raises(RequestError, match="teacher and student cut a text into different tokens") as caught:
        prune(arguments(taught.folder, tmp_path / "soft", step, **asked))
    assert "soft: 0" in str(caught.value.remedy)
    step["recover"] = {"max_steps": 2, "loss": {"hard": 1, "soft": 0}}
    assert prune(arguments(taught.folder, tmp_path / "hard", step, **asked))["removed"]["tokens_after"] < 350
    whole = {"vocabulary": True, "recover": {"max_steps": 2}}
    assert prune(arguments(taught.folder, tmp_path / "whole", whole, **asked))["training"]["loss"]["soft"] == 0.5


def test_questions_without_an_answer_are_left_out_and_counted(place: Path, tmp_path: Path) -> None:
    rows = (place / "train.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    none = json.dumps({"question": "where is it", "context": "the old city", "answers": []})
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("\n".join([*rows, *[none] * 8]) + "\n", encoding="utf-8")
    step = {"max_steps": 2}
    training = finetune(arguments(place / "untrained", tmp_path, step, train=mixed, task=TASK))["training"]
    assert (training["examples"], training["without_label"]) == (40, 8)
    empty = tmp_path / "empty.jsonl"
    empty.write_text(f"{none}\n" * 3, encoding="utf-8")
    with pytest.raises(RequestError, match="there is nothing to learn from") as caught:
        finetune(arguments(place / "untrained", tmp_path, step, train=mixed, validation=empty, task=TASK))
    assert "compress.validation" in str(caught.value.remedy)


def test_data_without_a_single_answer_to_learn_are_refused(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    path.write_text(json.dumps({"question": "where", "context": "the old city", "answers": ["river"]}) + "\n")
    with pytest.raises(RequestError, match="there is nothing to learn from: no answer is among the tokens"):
        finetune(arguments(place / "untrained", tmp_path, FAST, train=path, task=TASK))


def test_an_encoder_gets_a_head_for_answers_and_its_vocabulary_is_cut(place: Path, tmp_path: Path) -> None:
    make_model("bert-classifier", tmp_path / "encoder")  # its three classes are not two ends of an answer
    recipe = {
        "source": str(tmp_path / "encoder"),
        "task": TASK,
        "compress": {
            "data": str(place / "train.jsonl"),
            "steps": [{"finetune": FAST}, {"prune": {"vocabulary": True}}],
        },
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    compress_recipe(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["architectures"] == ["BertForQuestionAnswering"]
    assert exact(tmp_path / "model", place / "test.jsonl") > 0.8


def test_a_task_that_cannot_be_learned_names_those_that_can_and_answers_are_no_classes(
    place: Path, tmp_path: Path
) -> None:
    write_csv(tmp_path / "train.csv", texts(9))
    recipe = {
        "source": str(place / "untrained"),
        "task": "fill-mask",
        "compress": {"data": str(tmp_path / "train.csv"), "steps": [{"finetune": {}}]},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    with pytest.raises(RequestError, match="this task cannot be fine-tuned here: fill-mask") as caught:
        compress_recipe(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "model")
    assert "question-answering" in str(caught.value.remedy)
    mended = load_recipe(tmp_path / "recipe.yaml", ["task=question-answering", "compress.labels=[a, b]"])
    with pytest.raises(RequestError, match="the task has no classes to name: question-answering"):
        compress_recipe(mended, tmp_path / "model")
