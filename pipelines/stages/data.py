"""The evaluation data of a run, opened and encoded alike in every stage that needs it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifact import InputContract, Signature
from exporter.errors import RequestError
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


def refuse_unknown_labels(data: Dataset, labels: Mapping[int, str], classes: int | None = None) -> None:
    """Refuse data whose labels are no classes of the model: they are wrong for every variant, and for the original.

    Args:
        data: Read once where it is labelled.
        labels: The model's class names by index; empty where it has none.
        classes: The number of its classes, where it is known.

    Raises:
        RequestError: Names the file, the row and the label.
    """
    from pipelines.verification.predict import class_id

    if not data.labelled:
        return
    for number, row in enumerate(data, start=1):
        found = [row["label"]] if "label" in row else row.get("tags", ())
        try:
            for label in found:
                class_id(label, labels, classes if "label" in row else None)  # a tag below 0 is one that does not count
        except RequestError as error:
            shown = repr(error.value) if len(repr(error.value)) <= 80 else f"{repr(error.value)[:77]}..."
            known = ", ".join(list(labels.values())[:10]) + (", ..." if len(labels) > 10 else "")
            has = f"It has {known}" if labels else "It names none, so that labels must be numbers"
            raise RequestError(
                f"a label in {data.origin} is no class of the model",
                f"{shown} in row {number}",
                f"{has}. Mend the data, or name another column with --column",
            ) from error
