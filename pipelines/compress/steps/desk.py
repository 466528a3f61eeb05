"""What every step has before it: the model, its data, its teacher, opened from the stage's arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from calibration.datasets import Dataset, limited, load_task_dataset
from calibration.roles import TRUTH
from exporter.errors import RequestError
from exporter.preprocess import read_labels
from exporter.sources import Source
from exporter.tasks import Task, get_task
from pipelines.compress.examples import (
    Examples,
    encode_examples,
    encode_pairs,
    is_labelled,
    join,
    only,
    refuse_missing_classes,
    with_teacher,
)
from pipelines.compress.models import BY_TOKEN, HEADS, MODEL, open_trainable, save_model
from pipelines.compress.sections import Loss, Training
from pipelines.compress.teacher import ANSWERS, refuse_unlike
from pipelines.processes import report_progress


@dataclass
class Desk:
    """One step's model and data.

    Attributes:
        source: The model that enters.
        task: What it does.
        arguments: Of the stage: ``source``, ``task``, ``data`` (``train``, ``validation``, ``unlabelled``: ``path``,
            ``columns``, ``split``, ``limit`` or null), ``seed``, ``metric``, ``teacher``, ``answers``, ``checkpoints``,
            ``folder``.
    """

    source: Source
    task: Task
    arguments: Mapping[str, Any]
    _data: dict[str, Dataset | None] = field(default_factory=dict)

    @cached_property
    def model(self) -> Any:
        return open_trainable(self.source, self.task)

    @cached_property
    def encoder(self) -> Any:
        return encoder_of(self.source, self.task)

    @property
    def labels(self) -> dict[int, str]:
        return {} if self.source.files_folder is None else read_labels(self.source.files_folder)

    @property
    def seed(self) -> int:
        return int(self.arguments["seed"])

    @property
    def folder(self) -> Path:
        return Path(self.arguments["folder"])

    @property
    def pad(self) -> dict[str, int]:
        return {"input_ids": int(getattr(self.encoder, "pad_id", None) or 0)}

    @property
    def pad_side(self) -> str:
        return str(getattr(self.encoder, "pad_side", "right"))

    def data(self, name: str) -> Dataset | None:
        """One of the step's data sets, or ``None``; opening one reads all of it, so that is done once."""
        if name not in self._data:
            self._data[name] = open_rows(self.task.name, self.arguments["data"].get(name), self.seed)
        return self._data[name]

    def examples(self, max_length: int | None, *, encoder: Any = None, labelled: bool = True) -> Examples:
        """The rows to train on, those of the labelled data first; without their labels where `labelled` is false."""
        parts: list[Examples] = []
        for name in ("train", "unlabelled"):
            data = self.data(name)
            if data is not None:
                bare = name == "unlabelled" or not labelled
                rows: Any = ({k: v for k, v in row.items() if k not in TRUTH} for row in data) if bare else data
                first = sum(len(part) for part in parts)
                parts.append(
                    encode_examples(
                        self.task.name,
                        encoder or self.encoder,
                        rows,
                        labels=self.labels,
                        max_length=max_length,
                        first=first,
                    )
                )
        if not parts:
            raise RequestError("there is nothing to train on", "no data", "Give compress.data")
        return join(parts)

    def pairs(self, name: str, max_length: int | None) -> Examples:
        """Pairs of texts with their scores, of one of the data sets."""
        return encode_pairs(self.encoder, self.data(name) or (), largest=self.largest_score, max_length=max_length)

    @cached_property
    def largest_score(self) -> float:
        """What the scores of pairs are divided by, so that they can be cosines: the largest of the training data."""
        return max([1.0, *(abs(row["score"]) for row in self.data("train") or ())])

    @property
    def labelled(self) -> bool:
        data = self.data("train")
        return data is not None and data.labelled

    def pool(self, device: Any = "cpu") -> Any:
        """From hidden states and mask to the sentence embedding; ``None`` where the model has logits."""
        if self.task.name != "feature-extraction":
            return None
        from exporter.original.pooling import load_sentence_head, pool_mean

        head = load_sentence_head(self.source)
        return pool_mean if head is None else head.to(device).eval().requires_grad_(False)

    def save(self, model: Any, **options: Any) -> dict[str, Any]:
        """Write the model that the step leaves; returns its size and cost.

        Of several processes that train together the first one writes.
        """
        from pipelines.compress.ranks import is_first

        if not is_first():
            return {}
        from exporter.structure.checkpoint import WEIGHTS
        from pipelines.compress.measure import measure_model

        model = model.cpu().eval()
        save_model(model, self.source, self.folder / MODEL, **options)
        return measure_model(model, self.folder / MODEL / WEIGHTS)


def open_desk(arguments: Mapping[str, Any]) -> Desk:
    """The desk that a stage's arguments describe."""
    return Desk(Source.from_dict(dict(arguments["source"])), get_task(arguments["task"]), arguments)


def encoder_of(source: Source, task: Task) -> Any:
    """The pre-processing of a model."""
    from exporter.original.open import open_original

    return open_original(source, task).encoder


def open_rows(task: str, asked: Mapping[str, Any] | None, seed: int) -> Dataset | None:
    """One of the data sets of the recipe's section `compress:`."""
    if asked is None:
        return None
    data = load_task_dataset(task, Path(asked["path"]), columns=asked["columns"], split=asked["split"])
    return limited(data, asked.get("limit"), seed=seed)


def learn(desk: Desk, model: Any, settings: Training, loss: Loss | None, *, callbacks: Any = ()) -> dict[str, Any]:
    """Train a model by the labels, and by the teacher where `loss` is given and there is one; returns the record.

    Raises:
        RequestError: Labels or classes are wrong, or teacher and student do not go together.
    """
    import torch

    from pipelines.compress.learning import Answers, Lesson, Terms, usual_layer_map
    from pipelines.compress.magnitude import KeepZeros, zeros_of
    from pipelines.compress.training import train

    arguments = desk.arguments
    teacher = Source.from_dict(dict(arguments["teacher"])) if arguments.get("teacher") and loss is not None else None
    terms = Terms.of(loss or Loss(), desk.task.name, labelled=desk.labelled, teacher=teacher is not None)
    if terms.hard and not desk.labelled:
        raise RequestError(
            "there are no labels to learn from", "compress.data", "Give a column of labels, or loss.hard: 0"
        )
    train_data = desk.data("train")
    if terms.hard and train_data is not None and desk.task.name in HEADS:
        refuse_missing_classes(train_data, desk.labels)
    pairs = bool(terms.hard) and desk.task.name == "feature-extraction"
    judged, score = _validation(desk, settings, pairs)
    examples = desk.pairs("train", settings.max_length) if pairs else desk.examples(settings.max_length)
    known = [is_labelled(example) for example in examples.items]
    if terms.hard:
        _refuse_unknown(known, desk, "compress.data")
        if not all(known):
            report_progress(f"{known.count(False)} of {len(known)} rows have no label, or none within their tokens")
            if not (terms.soft or terms.embedding or terms.inner):
                examples = only(examples, known)  # the others teach nothing
    lesson = Lesson(terms, pool=desk.pool())
    if teacher is not None:
        their_encoder = encoder_of(teacher, desk.task)
        if hasattr(their_encoder, "tokenizer"):
            refuse_unlike(teacher, desk.source, (their_encoder, desk.encoder), _some_texts(desk))
        if terms.soft or terms.embedding:
            lesson.answers = Answers(np.load(Path(arguments["answers"]) / ANSWERS, mmap_mode="r"))
        if terms.inner:
            lesson.teacher = open_trainable(teacher, desk.task)
            lesson.layer_map = usual_layer_map(_layers(model), _layers(lesson.teacher))
        by_token = bool(terms.soft) and desk.task.name in BY_TOKEN
        if (terms.inner or by_token) and not _same_tokenizer(their_encoder, desk.encoder):
            remedy = "Learn from labels alone (loss: {hard: 1, soft: 0}), or keep the teacher's tokens (no min_count)"
            if not by_token:
                remedy = "Match logits or embeddings only (soft, hard, embedding), or take the teacher's tokenizer"
            both = with_teacher(examples, desk.examples(settings.max_length, encoder=their_encoder), remedy)
            examples = both if terms.inner else examples
    torch.manual_seed(desk.seed)
    lesson.prepare(model)
    if not any(isinstance(callback, KeepZeros) for callback in callbacks) and (masks := zeros_of(model)):
        callbacks = [*callbacks, KeepZeros(None, "layer", 1, masks)]
    trained = train(
        model,
        settings,
        examples,
        lesson,
        folder=Path(arguments["checkpoints"]),
        seed=desk.seed,
        pad=desk.pad,
        pad_side=desk.pad_side,
        validation=judged,
        score=score,
        callbacks=callbacks,
    )
    lesson.finish(model)
    unlabelled = known.count(False) if terms.hard else 0
    told: dict[str, Any] = {name: value for name, value in terms.__dict__.items() if value}
    if pairs:
        told["scores_divided_by"] = desk.largest_score
    named = None if teacher is None else teacher.name
    return {**trained.to_dict(), "loss": told, "teacher": named, "without_label": unlabelled}


def _refuse_unknown(known: Sequence[bool], desk: Desk, where: str) -> None:
    if not any(known):
        answers = desk.task.name == "question-answering"
        told = f"no {'answer is among the tokens of its context' if answers else 'row has a label'}"
        raise RequestError("there is nothing to learn from", told, f"Mend {where}, or raise max_length")


def _same_tokenizer(one: Any, other: Any) -> bool:
    """Also where there is none, as of pictures."""
    return not hasattr(one, "tokenizer") or one.tokenizer.get_vocab() == other.tokenizer.get_vocab()


def _validation(desk: Desk, settings: Training, pairs: bool) -> tuple[Examples | None, Any]:
    from pipelines.compress.training import classes_score
    from pipelines.verification.metrics import get_metric

    data = desk.data("validation")
    if data is None or (desk.task.name == "feature-extraction" and not pairs):
        if settings.early_stopping:
            told = f"early_stopping {settings.early_stopping}, task {desk.task.name}"
            raise RequestError(
                "early stopping judges by labels, and there are none", told, "Leave it out, and set epochs or max_steps"
            )
        return None, None
    if not data.labelled:
        told = f"{data.origin} has {', '.join(data.roles)}"
        raise RequestError("the validation data have no labels", told, "Name their column with compress.columns")
    if pairs:
        return desk.pairs("validation", settings.max_length), None
    examples = encode_examples(desk.task.name, desk.encoder, data, labels=desk.labels, max_length=settings.max_length)
    _refuse_unknown([is_labelled(example) for example in examples.items], desk, "compress.validation")
    one_class_a_row = desk.task.name in ("text-classification", "image-classification")
    name = desk.arguments.get("metric") or desk.task.metric
    return examples, classes_score(get_metric(str(name))) if one_class_a_row else None


def _some_texts(desk: Desk, count: int = 64) -> list[str]:
    """A text of each of the first rows; of tokens, joined by spaces."""
    sets = [data for name in ("train", "unlabelled") if (data := desk.data(name)) is not None]
    found = []
    for row in (row for data in sets for row in islice(data, count)):
        first = next((row[role] for role in ("text", "tokens", "context") if role in row), "")
        found.append(first if isinstance(first, str) else " ".join(first))
    return found


def _layers(model: Any) -> int:
    from exporter.structure import layers_of

    return len(layers_of(model))
