"""`planish compress`, alone and on two processes that a launcher starts: real ones, over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from exporter.errors import RequestError
from pipelines.compress.command import compress_recipe
from pipelines.compress.steps.distil import distil
from pipelines.recipe import load_recipe
from tests.pipelines.compress.data import apart, arguments, write_csv
from tests.pipelines.compress.data import texts as rows_of

ROOT = Path(__file__).resolve().parents[3]
ROWS = 9 * 32 + 5  # of an epoch's last batch one process has four rows and the other one, or one all and the other none
STEPS = [
    {"finetune": {"epochs": 2, "learning_rate": 1e-3, "dropout": 0.0, "micro_batch": 4}},
    {"distil": {"layers": 2, "epochs": 1, "learning_rate": 1e-3, "dropout": 0.0}},
    {"prune": {"heads": 0.25}},
]


@pytest.fixture
def recipe(untrained: Path, tmp_path: Path) -> Path:
    write_csv(tmp_path / "train.csv", rows_of(ROWS))
    data = {"source": str(untrained), "compress": {"data": "train.csv", "steps": STEPS}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    return tmp_path / "recipe.yaml"


def start(arguments: list[str], cache: Path) -> subprocess.CompletedProcess[str]:
    places = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    env = {**os.environ, "PLANISH_CACHE": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": places}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)


def weights(folder: Path) -> dict[str, object]:
    from exporter.structure import read_state

    return {name: tensor.double() for name, tensor in read_state(folder, ["model.safetensors"]).items()}


@pytest.mark.slow
def test_two_processes_learn_what_one_does_and_what_they_trained_is_found_again(recipe: Path, tmp_path: Path) -> None:
    alone = start(["pipelines.compress", str(recipe), "--out", str(tmp_path / "one"), "--json"], tmp_path / "cache-1")
    assert alone.returncode == 0, alone.stderr
    told = json.loads(alone.stdout)
    assert [step["name"] for step in told["steps"]] == ["1-finetune", "2-distil", "3-prune"]

    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "-m", "pipelines.compress", str(recipe)]
    both = start([*launcher, "--out", str(tmp_path / "two"), "--json"], tmp_path / "cache-2")
    assert both.returncode == 0, both.stderr
    assert [step["record"]["training"]["devices"] for step in json.loads(both.stdout)["steps"][:2]] == [2, 2]
    assert apart(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-4

    again = start(["pipelines.compress", str(recipe), "--out", str(tmp_path / "again")], tmp_path / "cache-2")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("cached") == 4  # three steps, and the teacher's answers
    assert apart(weights(tmp_path / "two"), weights(tmp_path / "again")) == 0


@pytest.mark.slow
def test_two_processes_learn_inner_states_too(untrained: Path, tmp_path: Path) -> None:
    """Projections are no part of the model's own forward pass, and what is behind queries, keys and values gets no
    gradient. (Weights that no loss depends on are moved by rounding, so losses are compared.)
    """
    write_csv(tmp_path / "train.csv", rows_of(149))
    how = {"max_steps": 20, "learning_rate": 1e-3, "dropout": 0.0}
    student = {"hidden_size": 16, "num_hidden_layers": 1}
    step = {"config": student, "loss": {"hidden": 1, "relations": 1, "hard": 0, "soft": 0}, **how}
    data = {"source": str(untrained), "compress": {"data": "train.csv", "steps": [{"distil": step}]}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "-m", "pipelines.compress"]
    both = start(
        [*launcher, str(tmp_path / "recipe.yaml"), "--json", "--out", str(tmp_path / "two")], tmp_path / "cache"
    )
    assert both.returncode == 0, both.stderr
    (done,) = json.loads(both.stdout)["steps"]
    alone = distil(arguments(untrained, tmp_path, step, train=tmp_path / "train.csv", teacher=untrained))
    (loss,) = alone["training"]["losses"]
    (other,) = done["record"]["training"]["losses"]
    assert other["loss"] == pytest.approx(loss["loss"], rel=1e-3)


def test_what_is_wrong_is_said_before_anything_runs(recipe: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("")
    with pytest.raises(RequestError, match="something already where the model is to go"):
        compress_recipe(load_recipe(recipe), taken)
    with pytest.raises(RequestError, match="no steps to compress by"):
        compress_recipe(load_recipe(recipe, ["compress.steps=[]"]), tmp_path / "out")
    with pytest.raises(RequestError, match="this task cannot be fine-tuned here: fill-mask"):
        compress_recipe(load_recipe(recipe, ["task=fill-mask"]), tmp_path / "out")
