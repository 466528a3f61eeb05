"""A batch taken in parts trains the same weights as the whole of it; and seeds decide which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.compress import training
from pipelines.compress.steps.distil import distil
from pipelines.compress.steps.finetune import finetune
from tests.models import make_model
from tests.pipelines.compress.conftest import Teacher
from tests.pipelines.compress.data import apart, arguments, texts, weights_of, write_csv, write_tags

STEPS = {"max_steps": 20, "epochs": 5, "batch_size": 32, "dropout": 0.0, "learning_rate": 5e-4}
"""20 steps over 145 rows: every epoch ends with a step of 17, whose last part has one row."""
LIMIT = 1e-5


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("uneven") / "train.csv", texts(145, seed=3, shortest=1, longest=30))


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tagged")
    return make_model("mpnet", folder / "model"), write_tags(folder / "train.jsonl", 145)


def both_ways(run: Any, out: Path, *, micro: int = 4) -> float:
    """How far apart the weights are after a batch at once and one in parts."""
    run(out / "whole", STEPS)
    run(out / "parts", STEPS | {"micro_batch": micro})
    return apart(weights_of(out / "whole"), weights_of(out / "parts"))


def averaged_by_part(self: Any, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
    """The loss as it would be wrong: each part divided by its own number, then by the number of parts."""
    total, outputs = self.objective(model, inputs, {name: inputs[name] for name in self.input_names})
    counted = inputs["labels"].ne(-100).sum()
    loss = total / counted / self.current_gradient_accumulation_steps
    return (loss, outputs) if return_outputs else loss


def test_classes(untrained: Path, uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(out: Path, step: dict[str, Any]) -> None:
        record = finetune(arguments(untrained, out, step, train=uneven))["training"]
        assert record["steps"] == 20

    assert both_ways(run, tmp_path) <= LIMIT
    monkeypatch.setattr(training._Trainer, "compute_loss", averaged_by_part)
    assert both_ways(run, tmp_path / "wrong") > 10 * LIMIT, "the test would not notice a mean by part"


def test_tokens(tagged: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean is over the tokens of the whole step, of which its parts have different numbers."""
    model, data = tagged

    def run(out: Path, step: dict[str, Any]) -> None:
        finetune(arguments(model, out, step, train=data, task="token-classification"))

    assert both_ways(run, tmp_path) <= LIMIT
    monkeypatch.setattr(training._Trainer, "compute_loss", averaged_by_part)
    assert both_ways(run, tmp_path / "wrong") > 10 * LIMIT, "the test would not notice a mean by part"


def test_soft_targets(teacher: Teacher, train_csv: Path, tmp_path: Path) -> None:
    """304 rows: the last step of an epoch has 16."""

    def run(out: Path, step: dict[str, Any]) -> None:
        step = step | {"layers": 2, "loss": {"hard": 0.3, "soft": 0.7, "hidden": 0.1}}
        distil(arguments(teacher.folder, out, step, train=train_csv, teacher=teacher.folder, answers=teacher.answers))

    assert both_ways(run, tmp_path) <= LIMIT


def test_one_seed_gives_the_same_bits_and_another_other_weights(untrained: Path, uneven: Path, tmp_path: Path) -> None:
    step = {"max_steps": 8, "learning_rate": 1e-3}  # with the model's own dropout
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        finetune(arguments(untrained, tmp_path / name, step, train=uneven, seed=seed))
    one, again, other = (weights_of(tmp_path / name) for name in ("one", "again", "other"))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert apart(one, other) > 1e-4


def test_what_does_not_divide_is_refused_before_anything_is_read() -> None:
    from exporter.errors import RequestError
    from pipelines.compress.sections import Training

    assert training.divide(Training(batch_size=32, micro_batch=4), 1) == (4, 8)
    assert training.divide(Training(batch_size=32, micro_batch=4), 2) == (4, 4)
    with pytest.raises(RequestError, match=r"cannot be divided among the devices.*batch_size 32 over 3 devices"):
        training.divide(Training(batch_size=32), 3)
