"""Sentence encoders that learn from pairs of texts whose likeness is known."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from exporter.errors import RequestError
from pipelines.compress.command import compress_recipe
from pipelines.compress.examples import SECOND, TARGET, collator
from pipelines.compress.learning import Lesson, Terms
from pipelines.compress.models import MODEL
from pipelines.compress.steps.desk import open_desk
from pipelines.compress.steps.finetune import finetune
from pipelines.recipe import load_recipe
from pipelines.verification.metrics import get_metric
from tests.pipelines.compress.data import PLAIN, apart, arguments, texts, weights_of, write_csv

TASK = "feature-extraction"
HEADER = ("text", "text_pair", "score")
FAST = {"epochs": 6, "learning_rate": 2e-3, "dropout": 0.0}


def write_pairs(path: Path, count: int, seed: int = 0) -> Path:
    """Two texts of different lengths, and from 0 to 5 how many words of the first are in the second."""
    chance, rows = random.Random(seed), []
    for number in range(count):
        words = chance.sample(PLAIN, 15)
        shared = number % 6
        second = words[:shared] + words[5 : 10 - shared] + words[10 : 10 + chance.randint(0, 5)]
        chance.shuffle(second)
        rows.append((" ".join(words[:5]), " ".join(second), shared))
    return write_csv(path, rows, HEADER)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder / "train.csv", 243)
    write_pairs(folder / "test.csv", 90, seed=1)
    return folder


def spearman(folder: Path, data: Path) -> float:
    desk = open_desk(arguments(folder, data.parent / "desk", {}, train=data, task=TASK))
    examples, pool = desk.pairs("train", None), desk.pool()
    batch = collator(desk.pad)([examples[i] for i in range(len(examples))])
    found = []
    for prefix in ("", SECOND):
        inputs = {name: batch[prefix + name] for name in examples.inputs}
        with torch.no_grad():
            found.append(pool(desk.model.eval()(**inputs).last_hidden_state, inputs["attention_mask"]))
    cosines = torch.nn.functional.cosine_similarity(*found)
    return float(get_metric("spearman").value(cosines.numpy(), batch[TARGET].numpy()))


def test_an_encoder_learns_which_texts_are_alike(
    model_folder: Callable[..., Path], place: Path, tmp_path: Path
) -> None:
    encoder = model_folder("bert")
    asked = arguments(encoder, tmp_path, FAST, train=place / "train.csv", validation=place / "test.csv", task=TASK)
    record = finetune(asked)["training"]
    assert record["examples"] == 243
    assert record["loss"] == {"hard": 1.0, "temperature": 2.0, "scores_divided_by": 5.0}
    assert record["evaluations"][-1]["loss"] < 0.8 * record["evaluations"][0]["loss"]
    before, after = (spearman(folder, place / "test.csv") for folder in (encoder, tmp_path / MODEL))
    assert after > max(0.5, before + 0.1), (before, after)
    assert (tmp_path / MODEL / "1_Pooling" / "config.json").is_file(), "it is a sentence encoder still"


def test_the_loss_is_the_squared_distance_of_cosine_and_score(model_folder: Callable[..., Path], place: Path) -> None:
    desk = open_desk(arguments(model_folder("bert"), place / "desk", {}, train=place / "train.csv", task=TASK))
    examples, rows, pool = desk.pairs("train", None), [0, 5, 11], desk.pool()
    batch, by_hand = collator(desk.pad)([examples[i] for i in rows]), 0.0
    with torch.no_grad():
        lesson = Lesson(Terms(hard=0.5), pool=pool)
        total, _ = lesson(desk.model.eval(), batch, {name: batch[name] for name in examples.inputs})
        for row, number in zip(list(desk.data("train") or ()), range(12), strict=False):
            if number not in rows:
                continue
            inputs = desk.encoder.encode([row["text"]]), desk.encoder.encode([row["text_pair"]])
            both = []
            for one in inputs:
                tensors = {name: torch.from_numpy(array) for name, array in one.items()}
                both.append(pool(desk.model(**tensors).last_hidden_state, tensors["attention_mask"])[0].numpy())
            cosine = float(both[0] @ both[1] / np.linalg.norm(both[0]) / np.linalg.norm(both[1]))
            by_hand += 0.5 * (cosine - row["score"] / 5) ** 2
    assert float(total) == pytest.approx(by_hand, rel=1e-4)


def test_parts_of_a_batch_give_the_step_of_the_whole(
    model_folder: Callable[..., Path], place: Path, tmp_path: Path
) -> None:
    for name, more in (("whole", {}), ("parts", {"micro_batch": 4})):
        step = {**FAST, "epochs": 1, **more}
        finetune(arguments(model_folder("bert"), tmp_path / name, step, train=place / "train.csv", task=TASK))
    assert 0 < apart(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")) < 1e-5


def test_scores_that_are_cosines_already_stay_as_they_are(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    data = write_csv(tmp_path / "t.csv", [("good city", "old river", -0.5), ("good city", "big city", 0.5)], HEADER)
    desk = open_desk(arguments(model_folder("bert"), tmp_path, {}, train=data, task=TASK))
    assert [float(example[TARGET]) for example in desk.pairs("train", None).items] == [-0.5, 0.5]


def test_texts_without_scores_are_refused(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    data = write_csv(tmp_path / "t.csv", [(text,) for text, _ in texts(10)], ["text"])
    with pytest.raises(RequestError, match="a sentence encoder has nothing to learn from here: texts alone") as caught:
        finetune(arguments(model_folder("bert"), tmp_path, FAST, train=data, task=TASK))
    assert "text_pair, score" in str(caught.value.remedy)


def test_a_recipe_trains_an_encoder_and_stops_early(
    model_folder: Callable[..., Path], place: Path, tmp_path: Path
) -> None:
    recipe: dict[str, Any] = {
        "source": str(model_folder("bert")),
        "compress": {
            "data": str(place / "train.csv"),
            "validation": str(place / "test.csv"),
            "steps": [{"finetune": {**FAST, "epochs": 12, "learning_rate": 2e-2, "early_stopping": 1}}],
        },
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    done = compress_recipe(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "model")
    assert 1 < len(done["steps"][0]["record"]["training"]["evaluations"]) < 12
    assert spearman(tmp_path / "model", place / "test.csv") > 0.4
