"""Data, a trained teacher and its answers, made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pipelines.compress.models import MODEL
from pipelines.compress.steps.finetune import finetune
from pipelines.compress.teacher import answers
from tests.models import make_model
from tests.pipelines.compress.data import arguments, texts, write_csv


@pytest.fixture(scope="session")
def compress_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compress")


@pytest.fixture(scope="session")
def train_csv(compress_folder: Path) -> Path:
    """304 labelled texts."""
    return write_csv(compress_folder / "train.csv", texts(304))


@pytest.fixture(scope="session")
def validation_csv(compress_folder: Path) -> Path:
    return write_csv(compress_folder / "validation.csv", texts(60, seed=1))


class Teacher(NamedTuple):
    """A trained classifier of four layers, and its answers to `train_csv`."""

    folder: Path
    answers: Path
    record: dict[str, Any]


@pytest.fixture(scope="session")
def untrained(compress_folder: Path) -> Path:
    """A classifier of four layers with random weights."""
    return make_model("bert-classifier", compress_folder / "untrained", changes={"num_hidden_layers": 4})


@pytest.fixture(scope="session")
def teacher(untrained: Path, compress_folder: Path, train_csv: Path, validation_csv: Path) -> Teacher:
    out = compress_folder / "teacher"
    step = {"epochs": 10, "learning_rate": 3e-3}
    record = finetune(arguments(untrained, out, step, train=train_csv, validation=validation_csv))
    assert record["training"]["evaluations"][-1]["score"] > 0.9, "the tests below need a teacher that knows something"
    asked = arguments(out / MODEL, out / "answers", {}, train=train_csv)
    answers(asked | {"max_length": None})
    return Teacher(out / MODEL, out / "answers", record)


@pytest.fixture
def planted(tmp_path: Path) -> Callable[..., Path]:
    """``planted(folder, change, task)``: a copy of a model folder after `change(model)`."""

    def plant(folder: Path, change: Callable[[Any], object], task: str = "text-classification") -> Path:
        from exporter.sources import resolve_source
        from exporter.tasks import get_task
        from pipelines.compress.models import open_trainable, save_model

        source = resolve_source(str(folder))
        model = open_trainable(source, get_task(task))
        change(model)
        out = tmp_path / f"planted-{len(list(tmp_path.iterdir()))}"
        shutil.rmtree(out, ignore_errors=True)
        save_model(model, source, out)
        return out

    return plant
