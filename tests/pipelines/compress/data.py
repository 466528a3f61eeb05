"""Small data that can be learned, and the arguments of a step: what `pipelines.compress.run` gives it."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.sources import resolve_source
from pipelines.compress.models import MODEL
from tests.models import WORDS

LABELS = ("bad", "fair", "good")
"""Of the tiny classifiers."""
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
MARKS = {"bad": ("old", "small", "end"), "fair": ("where", "what", "which"), "good": ("good", "great", "big")}
"""Words that tell the class of a text."""
PLAIN = tuple(word for word in WORDS[:60] if not word.startswith("##") and word not in sum(MARKS.values(), ()))
PLACES = {"B-PER": "man", "I-PER": "men", "B-LOC": "city", "I-LOC": "river"}
"""Words that tell their own tag."""


def texts(count: int, seed: int = 0, shortest: int = 3, longest: int = 12) -> list[tuple[str, str]]:
    """Texts of uneven lengths and their classes, all classes in turn."""
    chance = random.Random(seed)
    found = []
    for number in range(count):
        label = LABELS[number % 3]
        words = [chance.choice(PLAIN) for _ in range(chance.randint(shortest, longest))]
        for _ in range(2):
            words.insert(chance.randrange(len(words) + 1), chance.choice(MARKS[label]))
        found.append((" ".join(words), label))
    return found


def write_csv(path: Path, rows: Sequence[Sequence[Any]], header: Sequence[str] = ("text", "label")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def write_tags(path: Path, count: int, seed: int = 0) -> Path:
    """Tokens with their tags, in rows of 2 to 14 tokens."""
    chance, tag_of = random.Random(seed), {word: tag for tag, word in PLACES.items()}
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            tokens = [chance.choice([*PLAIN[:20], *PLACES.values()]) for _ in range(chance.randint(2, 14))]
            row = {"tokens": tokens, "tags": [tag_of.get(token, "O") for token in tokens]}
            file.write(json.dumps(row) + "\n")
    return path


def write_questions(path: Path, count: int, seed: int = 0) -> Path:
    """Questions whose answer is two words that stand nowhere else, in 3 to 20 words."""
    chance = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            words = [chance.choice(PLAIN[:20]) for _ in range(chance.randint(3, 20))]
            at = chance.randrange(len(words) - 1)
            words[at : at + 2] = chance.choice(("man", "city")), chance.choice(("men", "river"))
            answer = {"text": " ".join(words[at : at + 2]), "answer_start": len(" ".join([*words[:at], ""]))}
            row = {"question": "where is it", "context": " ".join(words), "answers": [answer]}
            file.write(json.dumps(row) + "\n")
    return path


def data_set(path: Path | None, **more: Any) -> dict[str, Any] | None:
    """One of the data sets in a step's arguments."""
    return None if path is None else {"path": str(path), "columns": {}, "split": None, "limit": None, **more}


def arguments(
    source: Path,
    folder: Path,
    step: Mapping[str, Any],
    *,
    train: Path | None = None,
    validation: Path | None = None,
    unlabelled: Path | None = None,
    task: str = "text-classification",
    teacher: Path | None = None,
    answers: Path | None = None,
    seed: int = 0,
    checkpoints: Path | None = None,
) -> dict[str, Any]:
    """The arguments of a step whose result goes to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "source": resolve_source(str(source)).to_dict(),
        "task": task,
        "step": dict(step),
        "data": {"train": data_set(train), "validation": data_set(validation), "unlabelled": data_set(unlabelled)},
        "teacher": None if teacher is None else resolve_source(str(teacher)).to_dict(),
        "answers": None if answers is None else str(answers),
        "checkpoints": str(checkpoints or folder / "checkpoints"),
        "seed": seed,
        "metric": None,
        "folder": str(folder),
    }


def weights_of(folder: Path) -> dict[str, Any]:
    """The tensors of the model that a step left in `folder`, float64."""
    from exporter.structure import read_state

    return {name: tensor.double() for name, tensor in read_state(folder / MODEL, ["model.safetensors"]).items()}


def apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Global L2 norm of the difference of two models' weights, over that of the weights."""
    assert one.keys() == other.keys()
    difference = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return float((difference / sum(float(tensor.square().sum()) for tensor in one.values())) ** 0.5)


def opened(folder: Path, task: str = "text-classification") -> Any:
    """The `transformers` model in a folder."""
    from exporter.tasks import get_task
    from pipelines.compress.models import open_trainable

    return open_trainable(resolve_source(str(folder)), get_task(task))


def logits(model: Any) -> Any:
    """What a model says of a few tokens, always the same."""
    import torch

    ids = torch.randint(5, 150, (4, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(input_ids=ids)[0]
