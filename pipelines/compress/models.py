"""The models that steps work on: opened for training, given a head, written as a folder that is a source again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.errors import RequestError
from exporter.preprocess import read_labels
from exporter.sources import Source, resolve_source
from exporter.structure import save_checkpoint
from exporter.structure.checkpoint import files_beside, read_structure
from exporter.tasks import Task, check_task

MODEL = "model"
"""The folder in a step's result that holds its model."""
_SENTENCE_FILES = re.compile(r"^(modules|config_sentence_transformers|sentence_\w+_config)\.json$|/")
# Tasks whose head the names of its classes describe.
HEADS = ("text-classification", "token-classification", "image-classification")
TRAINABLE = (*HEADS, "question-answering", "feature-extraction")
"""Tasks that can be learned from labels."""
BY_TOKEN = ("token-classification", "question-answering")
"""Tasks whose logits belong to tokens."""


def open_trainable(source: Source, task: Task) -> Any:
    """The `transformers` model of a source in FP32, every weight of it trainable, in evaluation mode.

    Raises:
        RequestError: As `exporter.original.huggingface.load_model`; or the source is no model folder.
    """
    from exporter.original.huggingface import load_model

    if not source.is_folder:
        raise RequestError("only Hugging Face model folders can be compressed", f"{source.spec} ({source.kind})")
    return load_model(source, task).requires_grad_(True)


def needs_head(source: Source, task: Task, labels: Sequence[str]) -> bool:
    """Whether a task's head is missing in a source, or has other classes.

    Raises:
        RequestError: The source has the classes in another order: says which.
    """
    try:
        check_task(source, task)
    except RequestError:
        return True
    if task.name not in HEADS or not labels:
        return False
    there = _classes(source)
    if not there or list(labels) == there:
        return False
    refuse_other_order(source, labels)
    return True


def refuse_other_order(source: Source, labels: Sequence[str]) -> None:
    """Refuse a model that has these classes in another order.

    Raises:
        RequestError: Says which order it has.
    """
    there = _classes(source)
    if list(labels) != there and sorted(labels) == sorted(there):
        remedy = f"Give compress.labels in the model's order: [{', '.join(there)}]"
        raise RequestError("the labels have another order than the model's classes", ", ".join(labels), remedy)


def _classes(source: Source) -> list[str]:
    named = {} if source.files_folder is None else read_labels(source.files_folder)
    return [name for _, name in sorted(named.items())]


def add_head(source: Source, task: Task, labels: Sequence[str], folder: Path, seed: int) -> Source:
    """Write the source's encoder with a new head for `labels` to `folder`; its weights are random by `seed`.

    Args:
        source: The source.
        task: What the head is for.
        labels: Names of its classes; none for question-answering.
        folder: Where to.
        seed: Of the weights.

    Raises:
        RequestError: No head of the task can be added, or the model cannot be opened with one.
    """
    import torch
    import transformers

    from exporter.original.huggingface import quiet_transformers

    if task.name not in (*HEADS, "question-answering"):
        fitting = ", ".join((*HEADS, "question-answering"))
        raise RequestError("the model has no head for the task, and none can be added", task.name, f"Tasks: {fitting}")
    if source.path is None or not source.is_folder:
        raise RequestError("only Hugging Face model folders can be compressed", f"{source.spec} ({source.kind})")
    if read_structure(source.path) is not None:
        remedy = "Fine-tune it before it is compressed"
        raise RequestError("a model that was changed inside cannot be given a new head", source.spec, remedy)
    names = dict(enumerate(labels))
    if task.name not in HEADS:  # start and end of an answer, whatever the classes of the source's own head
        names = {0: "LABEL_0", 1: "LABEL_1"}
    torch.manual_seed(seed)
    with quiet_transformers():
        try:
            model = getattr(transformers, str(task.auto_class)).from_pretrained(
                source.path,
                num_labels=len(names),
                id2label=names,
                label2id={name: index for index, name in names.items()},
                ignore_mismatched_sizes=True,
                use_safetensors=not source.pickled,
                local_files_only=True,
                trust_remote_code=source.trust_remote_code,
                dtype=torch.float32,
            )
        except (ValueError, OSError, KeyError) as error:
            remedy = f"Give a model that transformers has a head of {task.name} for"
            raise RequestError("the model cannot be given a head", f"{source.spec}: {error}"[:300], remedy) from error
    save_model(model, source, folder, sentence=False)
    return resolve_source(str(folder), trust=source.pickled)


CARD, SOURCE_CARD = "README.md", "README.source.md"


def save_model(
    model: Any,
    source: Source,
    folder: Path,
    *,
    replaced: Mapping[str, Path] | None = None,
    dropped: Iterable[str] = (),
    clustered: Iterable[str] = (),
    sentence: bool = True,
) -> None:
    """Write a model with the small files of the source that it came from, and the modules behind the encoder.

    Args:
        model: The `transformers` model.
        source: Where it came from.
        folder: Where to.
        replaced: Small files that are others now, by name: a tokenizer that was cut.
        dropped: Small files that are no longer true.
        clustered: See `save_checkpoint`.
        sentence: The folder stays one of sentence-transformers where it was one.

    The source's model card goes into `SOURCE_CARD`: what it says holds for the source.
    """
    gone = set(dropped)
    beside = {
        name: path
        for name, path in files_beside(source)
        if name not in gone and (sentence or not _SENTENCE_FILES.search(name))
    }
    new_card = CARD in beside and SOURCE_CARD not in beside
    if new_card:
        beside[SOURCE_CARD] = beside.pop(CARD)
    save_checkpoint(model, folder, small_files=(beside | dict(replaced or {})).items(), clustered=clustered)
    if new_card:
        (folder / CARD).write_text(_card(source), encoding="utf-8")


def _card(source: Source) -> str:
    """A model card that claims nothing of the changed model, with the licence of the one that it came from."""
    front = f"---\nlicense: {json.dumps(source.licence)}\n---\n" if source.licence else ""
    return (
        f"{front}# {source.name}, changed\n\n"
        "Planish trained this model further or made it smaller. The card of the model that it came from is "
        f"[{SOURCE_CARD}]({SOURCE_CARD}): what that says of task, training, use and quality is about that model.\n"
    )


def opened(folder: Path, name: str) -> Source:
    """The model that a step wrote, as a source; called `name` whatever its folder is called."""
    from dataclasses import replace

    found = resolve_source(str(folder / MODEL))
    return replace(found, spec=name, name=name)
