"""A training that was killed goes on and ends with the same weights; one by another recipe does not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.compress import training
from pipelines.compress.interrupted import differences, note_settings
from pipelines.compress.steps.finetune import finetune
from pipelines.compress.steps.prune import prune
from pipelines.compress.training import last_checkpoint
from tests.pipelines.compress.data import arguments, weights_of

ROOT = Path(__file__).resolve().parents[3]


class Interrupted(BaseException):
    """What no code catches."""


@contextmanager
def interrupted_at(step: int) -> Iterator[None]:
    """Trainings in this process end as the step after that one begins."""
    original = training._Trainer.training_step

    def ending(self: Any, *given: Any, **named: Any) -> Any:
        if self.state.global_step == step:
            raise Interrupted
        return original(self, *given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._Trainer, "training_step", ending)
        yield


def kill_after(step: int, asked: dict[str, Any], place: Path) -> int:
    """Run a step in a process, kill it once the checkpoint of `step` or a later one is whole; returns which."""
    given = place / "arguments.json"
    given.write_text(json.dumps(asked), encoding="utf-8")
    script = Path(__file__).with_name("step_to_kill.py")
    command = [sys.executable, str(script), "pipelines.compress.steps.finetune:finetune", str(given), "0.1"]
    # With another number of threads sums are taken in another order.
    threads = {name: str(torch.get_num_threads()) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    env = {**os.environ, **threads, "PYTHONPATH": str(ROOT)}
    with (place / "log").open("wb") as log:
        child = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=env)
    until = time.monotonic() + 120
    states = Path(asked["checkpoints"])
    while not [p for p in states.glob("checkpoint-*/trainer_state.json") if int(p.parent.name[11:]) >= step]:
        assert child.poll() is None, (place / "log").read_text()[-2000:]
        assert time.monotonic() < until
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    last = last_checkpoint(states)
    assert last is not None
    return int(last.name[11:])


SETTINGS = {"epochs": 2, "learning_rate": 1e-3, "save_minutes": 1e-9}
"""Of 304 rows a pass has 10 steps; with dropout, whose random numbers are gone on with."""


@pytest.fixture(scope="module")
def whole(untrained: Path, train_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The weights of a training that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    finetune(arguments(untrained, out, SETTINGS, train=train_csv))
    return weights_of(out)


@pytest.mark.parametrize("step", [4, 10, 17])
def test_an_interrupted_training_ends_with_the_same_bits(
    step: int, whole: dict[str, Any], untrained: Path, train_csv: Path, tmp_path: Path
) -> None:
    """Within the first pass, between the two, and within the second, whose order of rows is another."""
    asked = arguments(untrained, tmp_path, SETTINGS, train=train_csv)
    with interrupted_at(step), pytest.raises(Interrupted):
        finetune(asked)
    torch.manual_seed(99)
    assert finetune(asked)["training"]["resumed_at"] == step
    again = weights_of(tmp_path)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_killed_training_ends_with_the_same_bits(
    whole: dict[str, Any], untrained: Path, train_csv: Path, tmp_path: Path
) -> None:
    asked = arguments(untrained, tmp_path / "killed", SETTINGS, train=train_csv)
    killed_at = kill_after(13, asked, tmp_path)
    assert killed_at < 20
    record = finetune(asked)["training"]
    assert record["resumed_at"] == killed_at
    assert record["steps"] == 20
    again = weights_of(tmp_path / "killed")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("lost", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
def test_a_checkpoint_that_lacks_a_file_is_not_gone_on_from(
    lost: str, whole: dict[str, Any], untrained: Path, train_csv: Path, tmp_path: Path
) -> None:
    """Trainer would begin anew what is missing, and end with other weights without a word."""
    asked = arguments(untrained, tmp_path, SETTINGS, train=train_csv)
    with interrupted_at(12), pytest.raises(Interrupted):
        finetune(asked)
    last = last_checkpoint(Path(asked["checkpoints"]))
    assert last is not None
    (last / lost).unlink()
    before = last_checkpoint(Path(asked["checkpoints"]))
    assert not last.exists()
    assert finetune(asked)["training"]["resumed_at"] == (0 if before is None else int(before.name[11:]))
    again = weights_of(tmp_path)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_gradual_pruning_goes_on_where_it_was(untrained: Path, train_csv: Path, tmp_path: Path) -> None:
    settings = {
        "sparsity": 0.8,
        "gradual": 4,
        "recover": {"epochs": 2, "learning_rate": 1e-3, "save_minutes": 1e-9, "teacher": False},
    }
    whole = prune(arguments(untrained, tmp_path / "whole", settings, train=train_csv))
    asked = arguments(untrained, tmp_path / "killed", settings, train=train_csv)
    with interrupted_at(6), pytest.raises(Interrupted):
        prune(asked)
    record = prune(asked)
    assert record["training"]["resumed_at"] == 6
    assert record["removed"] == whole["removed"]
    one, other = weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed")
    assert all(torch.equal(one[name], other[name]) for name in one)


def noted(folder: Path, **changed: Any) -> str:
    settings = {"epochs": 2.0, "loss": {"soft": 1.0, "hard": 0.0}, **changed}
    return note_settings(folder, {"step": "distil", "source": "abc", "settings": settings})


def test_another_recipe_says_what_differs(tmp_path: Path) -> None:
    assert noted(tmp_path / "one") == ""
    (tmp_path / "one" / "checkpoint-4").mkdir()
    (tmp_path / "one" / "checkpoint-4" / "trainer_state.json").write_text("{}")
    assert noted(tmp_path / "one") == "", "the same training goes on"
    told = noted(tmp_path / "two", epochs=3.0, loss={"soft": 1.0, "hard": 0.5})
    assert "an interrupted training of this model by another recipe is not gone on with" in told
    assert "epochs (2.0 then, 3.0 now)" in told
    assert "loss.hard (0.0 then, 0.5 now)" in told
    assert "soft" not in told
    assert noted(tmp_path / "three").endswith("it differs in data, teacher or seed")


def test_nothing_is_said_of_trainings_of_other_models(tmp_path: Path) -> None:
    noted(tmp_path / "one")
    (tmp_path / "one" / "checkpoint-4").mkdir()
    (tmp_path / "one" / "checkpoint-4" / "trainer_state.json").write_text("{}")
    other = {"step": "distil", "source": "another", "settings": {"epochs": 9.0}}
    assert note_settings(tmp_path / "two", other) == ""


def test_differences_name_keys_that_one_of_the_two_lacks() -> None:
    assert differences({"a": 1, "b": {"c": 2}}, {"b": {"c": 3}, "d": None}) == [
        "a (1 then, None now)",
        "b.c (2 then, 3 now)",
    ]
