from __future__ import annotations

import numpy as np
import pytest

from calibration.datasets import limited
from calibration.defaults import default_dataset, default_images, default_sentences, generated_tensors
from exporter.artifact import Axis, InputContract, Signature, TensorSpec
from exporter.errors import RequestError


def test_the_sentences_are_many_different_and_of_all_lengths() -> None:
    data = default_sentences()
    texts = [row["text"] for row in data]
    words = sorted(len(text.split()) for text in texts)
    assert len(texts) == len(set(texts)) == len(data) >= 250
    assert (words[0], words[-1] > 90) == (2, True)
    assert sum(text.endswith("?") for text in texts) >= 10
    assert data.origin == "built-in sentences"
    assert not data.labelled


def test_a_limit_holds_for_built_in_data_too() -> None:
    whole = default_sentences()
    few = limited(whole, 10, seed=3)
    assert len(few) == len(list(few)) == 10
    assert few.digest == limited(whole, 10, seed=3).digest != limited(whole, 10, seed=4).digest
    assert [row["text"] for row in few] == [row["text"] for row in whole if row in list(few)]
    assert limited(whole, 10_000) is limited(whole, None) is whole


def test_the_answers_stand_in_their_paragraphs() -> None:
    data = default_dataset("question-answering")
    rows = list(data)
    assert len(rows) >= 40
    assert data.labelled
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert row["context"].count(row["answers"][0]) >= 1, row
        assert row["question"].endswith("?")


def test_pictures_are_the_same_every_time_and_differ_from_each_other() -> None:
    one, two = default_images(6, 32), default_images(6, 32)
    assert one.digest == two.digest != default_images(6, 32, seed=1).digest
    pictures = [row["image"] for row in one]
    assert all(p.shape == (32, 32, 3) and p.dtype == np.uint8 for p in pictures)
    assert len({p.tobytes() for p in pictures}) == 6
    assert all(p.min() == 0 and p.max() == 255 for p in pictures)


def test_tokens() -> None:
    row = next(iter(default_dataset("token-classification")))
    assert row["tokens"] == ["Not", "today."]


def test_tensors_follow_signature_and_contract() -> None:
    signature = Signature(
        (
            TensorSpec("ids", "int64", ("batch", "sequence")),
            TensorSpec("mask", "int64", ("batch", "sequence")),
            TensorSpec("x", "float32", ("batch", 3)),
        ),
        (),
        (Axis("batch", 1, 8), Axis("sequence", 2, 512)),
    )
    contract = InputContract(True, "mask", {"ids": (5, 9)})
    data = default_dataset("custom", signature, contract)
    rows = list(data)
    lengths = {row["ids"].shape[1] for row in rows}
    assert len(lengths) > 5
    assert (min(lengths) >= 2, max(lengths) <= 32) == (True, True)
    assert all(row["ids"].shape == row["mask"].shape and row["x"].shape == (1, 3) for row in rows)
    assert {int(i) for row in rows for i in row["ids"].ravel()} == {5, 6, 7, 8, 9}
    assert all(row["mask"].all() for row in rows)
    assert data.digest == generated_tensors(signature, contract).digest


def test_a_task_without_data_says_so() -> None:
    with pytest.raises(RequestError, match="no built-in data"):
        default_dataset("custom")
