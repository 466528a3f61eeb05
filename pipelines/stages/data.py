"""The evaluation data of a run, opened and encoded alike in every stage that needs it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifact import InputContract, Signature
from exporter.sources import Source
from exporter.tasks import get_task

if TYPE_CHECKING:
    from calibration.datasets import Dataset

BATCH_SIZE = 8


def open_data(asked: Mapping[str, Any], task: str, signature: Signature, contract: InputContract) -> Dataset:
    """The user's data, or the built-in set of the task.

    Args:
        asked: ``path`` or null, ``columns``, ``limit``, ``split``, ``seed``.
        task: Name of the task.
        signature: The model's inputs: the roles of tensors.
        contract: Ranges that generated inputs keep to.

    Raises:
        RequestError: The data cannot be read, or lack what the task needs.
    """
    from calibration.datasets import limited, load_task_dataset
    from calibration.defaults import default_dataset

    if asked["path"] is None:
        built_in = default_dataset(task, signature, contract, seed=asked["seed"])
        return limited(built_in, asked["limit"], seed=asked["seed"])
    return load_task_dataset(
        task,
        Path(asked["path"]),
        columns=asked["columns"],
        limit=asked["limit"],
        seed=asked["seed"],
        split=asked["split"],
        inputs=[spec.name for spec in signature.inputs],
    )


def open_encoder(original: Mapping[str, Any], signature: Signature) -> Any:
    """The pre-processing of the source; ``None`` for raw tensors."""
    from exporter.preprocess import load_encoder

    source, task = Source.from_dict(dict(original["source"])), get_task(original["task"])
    if source.files_folder is None or task.name == "custom":
        return None
    return load_encoder(source.files_folder, task, signature)


def open_labels(original: Mapping[str, Any]) -> dict[int, str]:
    """The source's class names by index; empty where it has none."""
    from exporter.preprocess import read_labels

    source = Source.from_dict(dict(original["source"]))
    return {} if source.files_folder is None else read_labels(source.files_folder)


def open_problem(original: Mapping[str, Any]) -> str:
    """The ``problem_type`` of the source's configuration; empty where it has none."""
    from pipelines.postprocess import problem_type

    source = Source.from_dict(dict(original["source"]))
    return "" if source.files_folder is None else problem_type(source.files_folder)
