"""What a training does beside its loss: precision, memory, stopping, keeping the best, and a loss that is no number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.errors import EnvironmentLackError, RequestError
from pipelines.compress import training
from pipelines.compress.steps.finetune import finetune
from tests.models import make_model
from tests.pipelines.compress.data import apart, arguments, texts, weights_of, write_csv

FAST = {"epochs": 8, "learning_rate": 3e-3}


def test_bf16_trains(untrained: Path, train_csv: Path, tmp_path: Path) -> None:
    record = finetune(arguments(untrained, tmp_path / "bf16", FAST | {"precision": "bf16"}, train=train_csv))[
        "training"
    ]
    losses = [entry["loss"] for entry in record["losses"]]
    assert losses[-1] < 0.7 * losses[0]
    assert record["precision"] == "bf16"
    assert all(tensor.dtype == torch.float32 for tensor in stored(tmp_path / "bf16").values()), "weights stay FP32"
    finetune(arguments(untrained, tmp_path / "fp32", FAST, train=train_csv))
    assert apart(weights_of(tmp_path / "bf16"), weights_of(tmp_path / "fp32")) > 1e-5, "it ran in fp32"


def test_fp16_trains_on_a_gpu_and_is_refused_where_it_would_be_fp32(
    untrained: Path, train_csv: Path, tmp_path: Path
) -> None:
    asked = arguments(untrained, tmp_path, FAST | {"precision": "fp16"}, train=train_csv)
    if torch.cuda.is_available():
        losses = [entry["loss"] for entry in finetune(asked)["training"]["losses"]]
        assert losses[-1] < 0.7 * losses[0]
        return
    with pytest.raises(
        EnvironmentLackError, match=r"fp16 does not work here: on cpu it would be trained in fp32"
    ) as it:
        finetune(asked)
    assert it.value.remedy == "Train in bf16 or fp32 here, or on a GPU"


def stored(out: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(out / "model" / "model.safetensors")


def test_computing_activations_again_gives_the_same_weights(
    untrained: Path, train_csv: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    for name, more in (("kept", {}), ("again", {"gradient_checkpointing": True})):
        step = {"max_steps": 8, "dropout": 0.0, "learning_rate": 1e-3, **more}
        finetune(arguments(untrained, tmp_path / name, step, train=train_csv))
    assert apart(weights_of(tmp_path / "kept"), weights_of(tmp_path / "again")) <= 1e-6
    assert not [w for w in recwarn if "checkpointing" in str(w.message)]


def test_activations_are_really_computed_again(
    untrained: Path, train_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.bert.modeling_bert import BertSelfAttention

    runs = []
    forward = BertSelfAttention.forward
    monkeypatch.setattr(
        BertSelfAttention, "forward", lambda self, *a, **k: (runs.append(self.training), forward(self, *a, **k))[1]
    )
    counts = {}
    for again in (False, True):
        runs.clear()
        step = {"max_steps": 2, "gradient_checkpointing": again}
        finetune(arguments(untrained, tmp_path / str(again), step, train=train_csv))
        counts[again] = sum(runs)
    assert counts[True] == 2 * counts[False] > 0


def test_it_stops_when_nothing_gets_better(
    untrained: Path, train_csv: Path, validation_csv: Path, tmp_path: Path
) -> None:
    step = {"epochs": 20, "learning_rate": 1e-7, "early_stopping": 2}
    record = finetune(arguments(untrained, tmp_path, step, train=train_csv, validation=validation_csv))["training"]
    assert record["epochs"] < 20
    scores = [entry["score"] for entry in record["evaluations"]]
    assert len(scores) >= 3
    assert max(scores[-2:]) <= max(scores[:-2])


def test_the_best_model_is_kept_not_the_last(
    untrained: Path, train_csv: Path, validation_csv: Path, tmp_path: Path
) -> None:
    """Labels of the training data are wrong, so that what it learns makes it worse."""
    from calibration.datasets import load_task_dataset

    wrong = [(row["text"], {"bad": "fair", "fair": "good", "good": "bad"}[row["label"]])
             for row in load_task_dataset("text-classification", train_csv)]  # fmt: skip
    data = write_csv(tmp_path / "wrong.csv", wrong)
    record = finetune(arguments(untrained, tmp_path, FAST | {"epochs": 10}, train=data, validation=validation_csv))
    scores = [entry["score"] for entry in record["training"]["evaluations"]]
    assert scores[-1] < max(scores)
    assert score(tmp_path / "model", validation_csv) == pytest.approx(max(scores))


def score(folder: Path, data: Path) -> float:
    """The macro-F1 or accuracy of a model, by the task's own metric."""
    from calibration.datasets import load_task_dataset
    from exporter.sources import resolve_source
    from exporter.tasks import get_task
    from pipelines.compress.examples import collator, encode_examples
    from pipelines.compress.models import open_trainable
    from pipelines.compress.steps.desk import encoder_of
    from pipelines.verification.metrics import get_metric

    source, task = resolve_source(str(folder)), get_task("text-classification")
    model, encoder = open_trainable(source, task), encoder_of(source, task)
    labels = {0: "bad", 1: "fair", 2: "good"}
    rows = encode_examples(task.name, encoder, load_task_dataset(task.name, data), labels=labels)
    batch = collator({})([rows[i] for i in range(len(rows))])
    with torch.no_grad():
        logits = model(**{name: batch[name] for name in rows.inputs}).logits.numpy()
    metric = get_metric(str(task.metric))
    return training.classes_score(metric)(logits, batch["target"].numpy())


@pytest.mark.parametrize(("epochs", "evaluations", "expected"), [(2, 3, 6), (0.5, 1, 1), (0.5, 2, 1)])
def test_it_is_judged_as_often_as_asked(
    epochs: float, evaluations: int, expected: int, untrained: Path, train_csv: Path, validation_csv: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    step = {"epochs": epochs, "evaluations": evaluations, "batch_size": 8}
    record = finetune(arguments(untrained, tmp_path, step, train=train_csv, validation=validation_csv))["training"]
    assert len(record["evaluations"]) == expected
    assert record["evaluations"][-1]["step"] == record["steps"]


@pytest.mark.parametrize("kind", ["bert-classifier", "mpnet", "vit", "distilbert"])
def test_dropout_can_be_turned_off_in_every_kind_of_model(kind: str, model_folder: Callable[..., Path]) -> None:
    from exporter.sources import resolve_source
    from exporter.tasks import get_task
    from pipelines.compress.models import open_trainable
    from tests.models import KINDS

    model = open_trainable(resolve_source(str(model_folder(kind))), get_task(KINDS[kind].task))
    if kind == "vit":
        given: dict[str, Any] = {"pixel_values": torch.randn(2, 3, 32, 32)}
        model.config.hidden_dropout_prob = 0.1
    else:
        given = {"input_ids": torch.arange(20).reshape(2, 10) + 5}
    training._set_dropout(model, 0.0)
    model.train()
    assert torch.equal(model(**given)[0], model(**given)[0])
    if kind != "vit":  # whose own dropout is 0
        training._set_dropout(model, 0.5)
        assert not torch.equal(model(**given)[0], model(**given)[0])


def test_a_learning_rate_far_too_high_stops_and_names_the_step(
    untrained: Path, train_csv: Path, tmp_path: Path
) -> None:
    step = {"epochs": 3, "learning_rate": 1e30, "max_grad_norm": 0, "warmup": 0, "save_minutes": 1e-9}
    with pytest.raises(RequestError, match=r"training diverged.*step \d+") as caught:
        finetune(arguments(untrained, tmp_path, step, train=train_csv))
    assert "Lower learning_rate (1e+30)" in caught.value.remedy
    assert not (tmp_path / "model").exists()


def test_the_last_good_checkpoint_stays(
    untrained: Path, train_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = training._Trainer.training_step

    def poisoned(self: Any, model: Any, *more: Any, **named: Any) -> Any:
        if self.state.global_step == 5:
            with torch.no_grad():
                next(iter(model.parameters()))[3:] = float("nan")
        return objective(self, model, *more, **named)

    monkeypatch.setattr(training._Trainer, "training_step", poisoned)
    step = {"epochs": 3, "save_minutes": 1e-9}
    with pytest.raises(RequestError, match=r"the loss is nan at step 6.*checkpoint of step 5 is kept in"):
        finetune(arguments(untrained, tmp_path, step, train=train_csv))
    kept = training.last_checkpoint(tmp_path / "checkpoints")
    assert kept is not None
    assert kept.name == "checkpoint-5"
    from safetensors.torch import load_file

    assert all(torch.isfinite(tensor).all() for tensor in load_file(kept / "model.safetensors").values())


def test_weights_that_become_nan_in_the_last_step_are_not_the_result(
    untrained: Path, train_csv: Path, tmp_path: Path
) -> None:
    step = {"max_steps": 1, "learning_rate": 1e39, "max_grad_norm": 0, "warmup": 0}
    with pytest.raises(RequestError, match="training diverged"):
        finetune(arguments(untrained, tmp_path, step, train=train_csv))
    assert not (tmp_path / "model").exists()


def test_a_checkpoint_that_was_cut_off_is_not_gone_on_with(tmp_path: Path) -> None:
    for number, state in ((3, json.dumps({"global_step": 3})), (5, '{"global_st'), (7, None)):
        (tmp_path / f"checkpoint-{number}").mkdir()
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            (tmp_path / f"checkpoint-{number}" / name).write_bytes(b"as written")
        if state is not None:
            (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text(state)
    assert training.last_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3"]


def test_a_sentence_encoder_cannot_stop_early(tmp_path: Path, model_folder: Callable[..., Path]) -> None:
    from pipelines.compress.steps.distil import distil

    data = write_csv(tmp_path / "t.csv", [(text,) for text, _ in texts(10)], ["text"])
    step = {"layers": 1, "early_stopping": 2}
    asked = arguments(
        model_folder("bert"), tmp_path, step, train=data, validation=data, task="feature-extraction",
        teacher=model_folder("bert"), answers=tmp_path,
    )  # fmt: skip
    with pytest.raises(RequestError, match="early stopping judges by labels"):
        distil(asked)


def test_pictures_train(tmp_path: Path) -> None:
    from PIL import Image

    rows = []
    for number in range(48):
        shade = (number % 3) * 110
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (32, 32), (shade, shade, (number * 5) % 255)).save(path)
        rows.append((path.name, ("bad", "fair", "good")[number % 3]))
    data = write_csv(tmp_path / "train.csv", rows, ["image", "label"])
    model = make_model("vit", tmp_path / "vit")
    step = {"epochs": 10, "learning_rate": 3e-3, "batch_size": 16}
    record = finetune(arguments(model, tmp_path / "out", step, train=data, task="image-classification"))["training"]
    assert record["losses"][-1]["loss"] < 0.9
