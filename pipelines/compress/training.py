"""Training through `transformers.Trainer`: what a recipe says as its arguments, an objective as its loss, and what it
lacks: a stop at a loss that is no number, checkpoints by time, shared tensors in them.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from exporter.errors import EnvironmentLackError, PlanishError, RequestError
from exporter.structure.checkpoint import WEIGHTS, stored_once
from pipelines.compress.examples import COUNTED, INDEX, SECOND, TARGET, Example, Examples, collator
from pipelines.compress.objectives import IGNORED, hard_targets, logits_of, placed
from pipelines.compress.sections import Training
from pipelines.disk import remove_tree
from pipelines.processes import report_progress

_LOGGED_STEPS = 20
_SILENT = -1
"""The number of a row that is there to make devices run equally often."""
_NEEDED = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state*.pth")
"""What a checkpoint holds beside its state."""
# Its name in transformers 5.23 and later, and before.
_NAMES = ("activation_checkpointing", "gradient_checkpointing")
_CHECKPOINTING = next(name for name in _NAMES if name in TrainingArguments.__dataclass_fields__)


class Objective(Protocol):
    """What is minimised."""

    def __call__(self, model: Any, batch: Mapping[str, Any], inputs: Mapping[str, Any]) -> tuple[Any, Any]:
        """The summed loss of a batch and the model's outputs.

        Args:
            model: In training mode.
            batch: All of it, by key.
            inputs: The model's inputs alone.
        """


@dataclass(frozen=True)
class Trained:
    """What a training did.

    Attributes:
        steps: Optimizer steps.
        epochs: Passes over the data.
        seconds: Time it took, without what an interrupted run did before.
        losses: Step and mean loss since the one before.
        evaluations: Step, epoch and result of each evaluation on the validation data.
        resumed_at: Step that it went on from; 0: it began.
        examples: Rows trained on.
        devices: Processes that trained.
        precision: As asked for.
    """

    steps: int
    epochs: float
    seconds: float
    losses: list[dict[str, float]]
    evaluations: list[dict[str, float]]
    resumed_at: int
    examples: int
    devices: int
    precision: str

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def train(
    model: Any,
    settings: Training,
    examples: Examples,
    objective: Objective,
    *,
    folder: Path,
    seed: int,
    pad: Mapping[str, int],
    pad_side: str = "right",
    validation: Examples | None = None,
    score: Callable[[Any, Any], float] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trained:
    """Train a model in place; it is in evaluation mode afterwards.

    A training that was interrupted goes on from its last checkpoint in `folder`.

    Args:
        model: A `transformers` model.
        settings: How.
        examples: What on.
        objective: What is minimised.
        folder: Of checkpoints; emptied by the caller when what was trained is safe.
        seed: Of order and dropout.
        pad: Value of padding by input.
        pad_side: Where padding goes.
        validation: What it is judged on while it goes; the best of the models judged is kept.
        score: From logits and targets of the validation data to a figure, the higher the better; none: the loss.
        callbacks: Further ones. One whose ``unfinished`` is true says that the model is not yet what was asked for, and
            so no candidate for the best.

    Raises:
        RequestError: The loss is no number, or the batch does not fit the devices.
        EnvironmentLackError: `accelerate` is missing, or the precision does not run here.
    """
    if not len(examples):
        raise RequestError("there is nothing to train on", "0 rows", "Give training data")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    micro, accumulated = divide(settings, world)
    _set_dropout(model, settings.dropout)
    arguments = _arguments(
        settings, folder, seed, micro, accumulated, world=world, judged=validation is not None, score=score is not None
    )
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=_Rows(examples),
        eval_dataset=None if validation is None else _Rows(validation),
        data_collator=collator(pad, pad_side),
        compute_metrics=None if score is None else (lambda found: {"score": score(found.predictions, found.label_ids)}),
        callbacks=[_Progress(settings.save_minutes if world == 1 else None), *_stopping(settings), *callbacks],
    )
    _refuse_silent_fp32(trainer, settings)
    trainer.objective = objective
    trainer.input_names = examples.inputs
    trainer.order = _Order(examples.lengths, settings.batch_size, seed, whole=1 if world == 1 else micro * world)
    trainer.remove_callback(PrinterCallback)  # it prints every record
    last = last_checkpoint(folder)
    began = time.monotonic()
    resumed_at = 0 if last is None else _step_of(last)
    if last is not None:
        report_progress(f"going on from step {resumed_at}")
    try:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        if not _all_finite(model):  # the last step has no loss after it that would tell
            raise _NotANumber(trainer.state.global_step)
    except _NotANumber as error:
        raise _diverged(error, folder, settings) from error
    model.eval()
    history = trainer.state.log_history
    return Trained(
        steps=trainer.state.global_step,
        epochs=float(trainer.state.epoch or 0.0),
        seconds=time.monotonic() - began,
        losses=[{"step": e["step"], "loss": float(e["loss"])} for e in history if "loss" in e],
        evaluations=[
            {"step": e["step"], "epoch": e["epoch"], "loss": e["eval_loss"], "score": e.get("eval_score")}
            for e in history
            if "eval_loss" in e
        ],
        resumed_at=resumed_at,
        examples=len(examples),
        devices=world,
        precision=settings.precision,
    )


def divide(settings: Training, devices: int) -> tuple[int, int]:
    """Rows that a device takes at a time, and how many such parts it accumulates.

    Raises:
        RequestError: `batch_size` cannot be divided among the devices so.
    """
    share, rest = divmod(settings.batch_size, devices)
    micro = settings.micro_batch or share
    if rest or not share or share % micro:
        told = f"batch_size {settings.batch_size} over {devices} devices, micro_batch {settings.micro_batch}"
        raise RequestError("the batch cannot be divided among the devices", told, "Choose sizes that divide each other")
    return micro, share // micro


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint of a training that is whole; what an interruption left half written is removed."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        if _is_whole(path):
            whole.append(path)
        else:
            remove_tree(path)
    return max(whole, key=_step_of, default=None)


def _is_whole(checkpoint: Path) -> bool:
    """Whether nothing is missing: what is would be begun anew without a word, and the weights become others."""
    try:  # the state is what is written last
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return all(any(checkpoint.glob(pattern)) for pattern in _NEEDED)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[-1])


def _all_finite(model: Any) -> bool:
    return all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


class _Rows(torch.utils.data.Dataset[Example]):
    """Examples, as `torch` wants a data set to be; under the number `_SILENT` one of which nothing counts."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> Example:
        if number != _SILENT:
            return self.examples[number]
        some = self.examples[0]
        return some | {key: np.full_like(some[key], IGNORED) for key in (COUNTED, TARGET)} | {INDEX: _SILENT}


class _Order(torch.utils.data.Sampler[int]):
    """The order of an epoch: rows of like length in a batch, batches at random; by seed and epoch alone, so that an
    interrupted training goes on with it, and all devices and divisions of the batch see the same.

    Its length is a multiple of `whole`: silent rows end it. Without them `accelerate` would take some of the epoch's
    first rows again, to give each of several devices as many.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, *, whole: int = 1) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0
        self.silent = -len(self.lengths) % whole

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) + self.silent

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        return iter([*order, *[_SILENT] * self.silent])


class _Trainer(Trainer):
    """Minimises `objective`, divided by the number of what counts in the whole batch."""

    objective: Objective
    input_names: tuple[str, ...] = ()
    order: _Order | None = None
    loss_is_scaled_for_ga = True

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.model_accepts_loss_kwargs = True  # it counts what is not -100 in `labels`, over all parts and devices
        self.label_names = [TARGET]

    def _get_train_sampler(self, *_: Any) -> Any:
        return self.order

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        if any(getattr(callback, "unfinished", False) for callback in self.callback_handler.callbacks):
            return False
        return bool(super()._determine_best_metric(metrics, trial))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        heard, share = (inputs, 1.0) if self.order is None or not self.order.silent else _heard(inputs)
        total, outputs = self.objective(model, heard, {name: heard[name] for name in self.input_names})
        total, count = share * total, num_items_in_batch
        if count is None:
            count = inputs[COUNTED].ne(IGNORED).sum().clamp(min=1)
        loss = total / count
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes afterwards
        if self.accelerator.num_processes > 1:
            # Each process waits for the gradient of every weight, also of those that no term of the loss reaches.
            loss = loss + 0 * sum(weight.sum() for weight in model.parameters() if weight.requires_grad)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        loss = super().training_step(model, inputs, num_items_in_batch)
        # Looking at it waits for a GPU, so there only now and then.
        if (loss.device.type == "cpu" or self.state.global_step % _LOGGED_STEPS == 0) and not bool(
            torch.isfinite(loss)
        ):
            raise _NotANumber(self.state.global_step + 1, float(loss))
        return loss

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """By the labels alone: a teacher's answers are there for the training data only."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            mine = {name: inputs[name] for name in self.input_names}
            if SECOND + self.input_names[0] in inputs:  # pairs, which have no teacher
                loss = self.objective(model, inputs, mine)[0] / len(inputs[TARGET])
                return loss.detach(), None, None
            outputs, mask = model(**mine), inputs.get("attention_mask")
            logits, target = logits_of(outputs, mask), placed(inputs[TARGET], outputs, mask)
            loss = hard_targets(logits, target) / target.ne(IGNORED).sum().clamp(min=1)
        return loss.detach(), None if prediction_loss_only else logits.detach(), inputs[TARGET]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """A checkpoint of the weights alone: tensors that layers share are in it once."""
        if self.args.should_save:
            if not _all_finite(self.model):  # the checkpoint before this one stays the last
                raise _NotANumber(self.state.global_step)
            folder = Path(output_dir or self.args.output_dir or ".")
            folder.mkdir(parents=True, exist_ok=True)
            save_file(
                stored_once(self.accelerator.unwrap_model(self.model)), folder / WEIGHTS, metadata={"format": "pt"}
            )

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Shared tensors are missing in a checkpoint under all names but the first, and that is right."""


def _heard(batch: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """The rows of a batch that are not silent; of one without such a silent row, and the share 0 that it has in a loss.

    Each device has to run something, or the others wait for its gradients.
    """
    rows = (batch[INDEX] != _SILENT).nonzero().flatten()
    if len(rows):
        return {key: values[rows] for key, values in batch.items()}, 1.0
    return {key: values[:1] for key, values in batch.items()}, 0.0


class _NotANumber(Exception):
    def __init__(self, step: int, loss: float | None = None) -> None:
        what = f"the loss is {loss} at" if loss is not None else "weights are no numbers any more after"
        super().__init__(f"{what} step {step}")


class _Progress(TrainerCallback):
    """Tells how far it is, and has a checkpoint written every so many minutes."""

    def __init__(self, save_minutes: float | None) -> None:
        self.every_s = math.inf if save_minutes is None else 60 * save_minutes
        self.began = self.saved = self.told = time.monotonic()
        self.first = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = self.saved = time.monotonic()
        self.first = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        now = time.monotonic()
        if now - self.saved > self.every_s and state.global_step < state.max_steps:
            control.should_save, self.saved = True, now
        if now - self.told > 1.0:
            self.told = now
            done = state.global_step - self.first
            left_s = (state.max_steps - state.global_step) * (now - self.began) / max(1, done)
            loss = next((f", loss {e['loss']:.3g}" for e in reversed(state.log_history) if "loss" in e), "")
            report_progress(f"step {state.global_step} of {state.max_steps}{loss}, {_time(left_s)} left")
        return control


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _stopping(settings: Training) -> list[TrainerCallback]:
    patience = settings.early_stopping
    return [] if patience is None else [EarlyStoppingCallback(early_stopping_patience=patience)]


def _arguments(
    settings: Training, folder: Path, seed: int, micro: int, accumulated: int, *, world: int, judged: bool, score: bool
) -> TrainingArguments:
    schedule = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}[settings.schedule]
    when = "epoch" if settings.evaluations == 1 else "steps"
    # The clocks of several processes do not agree on when to save: they do after each epoch.
    often: dict[str, Any] = {"save_strategy": "epoch" if world > 1 else "no"}
    if judged:
        often = {"eval_strategy": when, "save_strategy": when, "load_best_model_at_end": True}
        often |= {"metric_for_best_model": "score" if score else "loss", "greater_is_better": score}
        if when == "steps":
            share = 1 / math.ceil(settings.epochs * settings.evaluations)
            often |= {"eval_steps": share, "save_steps": share}
            if share == 1:  # a share of steps must be below 1: 1 means every step
                often |= {"eval_strategy": "epoch", "save_strategy": "epoch"}
    # The other way loses what is seen of inner states: its first pass is without gradients.
    checkpointing = {
        _CHECKPOINTING: settings.gradient_checkpointing,
        f"{_CHECKPOINTING}_kwargs": {"use_reentrant": False},
    }
    try:
        return TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=settings.epochs,
            max_steps=settings.max_steps or -1,
            per_device_train_batch_size=micro,
            per_device_eval_batch_size=max(32, micro),
            gradient_accumulation_steps=accumulated,
            learning_rate=settings.learning_rate,
            warmup_steps=settings.warmup,
            lr_scheduler_type=schedule,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            bf16=settings.precision == "bf16",
            fp16=settings.precision == "fp16",
            use_cpu=not torch.cuda.is_available(),  # or bf16 is refused there, though it runs
            **checkpointing,
            seed=seed,
            data_seed=seed,
            save_total_limit=2,
            logging_steps=_LOGGED_STEPS,
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            ddp_find_unused_parameters=False,  # it looks at outputs, and the loss is made of more than these
            report_to=[],
            disable_tqdm=True,
            log_level="error",
            label_names=[TARGET],
            **often,
        )
    except ImportError as error:
        remedy = "pip install 'planish[compress]'"
        raise EnvironmentLackError("training needs a package that is missing", str(error)[:200], remedy) from error
    except ValueError as error:
        remedy = "Choose another precision: bf16, or fp32"
        raise EnvironmentLackError(
            f"training in {settings.precision} does not work here", str(error)[:200], remedy
        ) from error


def _refuse_silent_fp32(trainer: Trainer, settings: Training) -> None:
    """`accelerate` trains in FP32 without a word where it has no mixed precision: FP16 on a CPU."""
    if settings.precision != "fp32" and not getattr(trainer.accelerator, "native_amp", True):
        told = f"on {trainer.args.device} it would be trained in fp32"
        raise EnvironmentLackError(
            f"training in {settings.precision} does not work here", told, "Train in bf16 or fp32 here, or on a GPU"
        )


def _set_dropout(model: Any, probability: float | None) -> None:
    if probability is None:
        return
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = probability
        for name in ("dropout", "attention_dropout"):  # kept as a number by modules that apply it themselves
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, probability)


def _diverged(error: _NotANumber, folder: Path, settings: Training) -> PlanishError:
    last = last_checkpoint(folder)
    kept = f"the checkpoint of step {_step_of(last)} is kept in {folder}" if last else "no checkpoint was due yet"
    told = f"{error}; {kept}"
    remedy = f"Lower learning_rate ({settings.learning_rate:g})"
    remedy += "" if settings.precision == "fp32" else f", or train in fp32 instead of {settings.precision}"
    return RequestError("training diverged", told, remedy)


def classes_score(metric: Any) -> Callable[[Any, Any], float]:
    """A metric of classes as a score of logits (rows, classes) and targets (rows,)."""

    def score(logits: Any, targets: Any) -> float:
        return float(metric.value(np.asarray(logits).argmax(axis=-1), np.asarray(targets)))

    return score


__all__ = ["Objective", "Trained", "classes_score", "divide", "train"]
