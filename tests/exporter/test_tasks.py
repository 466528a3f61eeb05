from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import RequestError
from exporter.sources import Source, resolve_source
from exporter.tasks import Task, check_task, get_task, infer_task, register_task, tasks
from tests.models import KINDS

Folders = Callable[..., Path]


def with_config(folder: Path, to: Path, **changes: Any) -> Source:
    copy = Path(shutil.copytree(folder, to))
    path = copy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return resolve_source(str(copy))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_task_of_every_kind_of_folder_is_inferred(model_folder: Folders, kind: str) -> None:
    source = resolve_source(str(model_folder(kind)))
    task = infer_task(source)
    assert task.name == KINDS[kind].task
    check_task(source, task)


def test_a_factory_is_custom() -> None:
    source = resolve_source("tests.models:conv_factory")
    assert infer_task(source).name == "custom"
    with pytest.raises(RequestError, match="custom"):
        check_task(source, get_task("text-classification"))


@pytest.mark.parametrize(
    ("synonym", "name"),
    [
        ("masked-lm", "fill-mask"),  # of optimum's
        ("sentence-similarity", "feature-extraction"),
        ("sequence-classification", "text-classification"),
        ("ner", "token-classification"),  # of ours
        ("Question_Answering", "question-answering"),
        ("sentiment-analysis", "text-classification"),
    ],
)
def test_synonyms(synonym: str, name: str) -> None:
    assert get_task(synonym).name == name


def test_an_unknown_task_names_the_nearest_and_all() -> None:
    with pytest.raises(RequestError) as caught:
        get_task("text-clasification")
    assert "Did you mean text-classification?" in str(caught.value)
    assert all(name in str(caught.value) for name in tasks())
    with pytest.raises(RequestError, match="unknown task: causal-lm"):
        get_task("causal-lm")


@pytest.mark.parametrize(
    "architectures",
    [
        ["BertForPreTraining"],
        ["BertForMaskedLM", "BertForSequenceClassification"],
        ["GPT2LMHeadModel"],
        ["LlamaForCausalLM"],
        [],
        None,
    ],
)
def test_what_leaves_the_task_open_lists_the_choices(
    model_folder: Folders, tmp_path: Path, architectures: list[str] | None
) -> None:
    source = with_config(model_folder("bert-mlm"), tmp_path / "m", architectures=architectures)
    with pytest.raises(RequestError) as caught:
        infer_task(source)
    assert "cannot be inferred" in caught.value.what
    assert "fill-mask, image-classification" in str(caught.value.remedy)
    assert "custom" not in str(caught.value.remedy)
    if architectures:
        assert architectures[0] in str(caught.value.value)


def test_modules_json_without_a_pooling_says_nothing(model_folder: Folders, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model_folder("bert-classifier"), tmp_path / "m"))
    (copy / "modules.json").write_text('[{"type": "sentence_transformers.base.modules.transformer.Transformer"}]')
    assert infer_task(resolve_source(str(copy))).name == "text-classification"


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("bert-mlm", "text-classification"),
        ("bert-classifier", "fill-mask"),
        ("bert", "question-answering"),
        ("vit", "text-classification"),
    ],
)
def test_a_task_whose_head_is_missing_is_refused(model_folder: Folders, kind: str, task: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_task(resolve_source(str(model_folder(kind))), get_task(task))
    assert "no head" in caught.value.what
    assert KINDS[kind].model in str(caught.value.value)
    assert KINDS[kind].task in str(caught.value.remedy)


def test_every_encoder_gives_features(model_folder: Folders) -> None:
    for kind in ("bert-mlm", "bert-classifier", "vit"):
        check_task(resolve_source(str(model_folder(kind))), get_task("feature-extraction"))


def test_a_folder_is_not_custom(model_folder: Folders) -> None:
    with pytest.raises(RequestError, match="cannot have the task custom"):
        check_task(resolve_source(str(model_folder("bert"))), get_task("custom"))


def test_a_task_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    from exporter.tasks import registry

    monkeypatch.setattr(registry, "_TASKS", dict(tasks()))
    mine = register_task(replace(get_task("text-classification"), name="spam", synonyms=("ham",)))
    assert isinstance(mine, Task)
    assert get_task("ham") is mine


def test_logits_are_outputs_and_label_roles_are_no_inputs() -> None:
    for task in tasks().values():
        assert set(task.logits) <= set(task.outputs), task.name
        assert not set(task.roles) & set(task.label_roles), task.name


def test_every_metric_that_a_task_names_exists() -> None:
    from pipelines.verification.metrics import metrics

    assert {task.metric for task in tasks().values() if task.metric} <= set(metrics())
