"""The registry of tasks."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from exporter.errors import RequestError

Modality = Literal["text", "image", "tensor"]


@dataclass(frozen=True)
class Task:
    """What a model does, which fixes its outputs, its data and its metric.

    Attributes:
        name: Hugging Face's name of the task.
        auto_class: The class in `transformers` that opens such a model; ``None`` where `transformers` does not.
        architecture_suffixes: Endings of the class names in a config's ``architectures`` that mean this task.
        modality: What goes in.
        metric: Name of the metric on labelled data (metrics live in ``pipelines/verification``); ``None``: no metric.
        outputs: Names of the graph's outputs, in order; those that a model does not have are left out. Empty: declared
            by the model.
        logits: The outputs that are logits, for which top-1 agreement means something.
        roles: The columns that data must have for the model to run on it.
        label_roles: The further columns that the metric needs.
        synonyms: Other names that people use, beside those that `optimum` knows.
        truncation: What is cut from a pair of texts that is too long: ``"longest_first"`` or ``"only_second"``.
    """

    name: str
    auto_class: str | None
    architecture_suffixes: tuple[str, ...]
    modality: Modality
    metric: str | None
    outputs: tuple[str, ...]
    logits: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    label_roles: tuple[str, ...] = ()
    synonyms: tuple[str, ...] = ()
    truncation: str = "longest_first"


_TASKS: dict[str, Task] = {}


def register_task(task: Task) -> Task:
    """Make a task known under its name and synonyms."""
    _TASKS[task.name] = task
    return task


def tasks() -> dict[str, Task]:
    """All registered tasks by name."""
    import exporter.tasks.builtin  # noqa: F401 - registers them

    return dict(_TASKS)


def get_task(name: str) -> Task:
    """The task of that name or synonym.

    Raises:
        RequestError: There is none; lists the choices.
    """
    known = tasks()
    wanted = name.strip().lower().replace("_", "-").replace(" ", "-")
    if wanted in known:
        return known[wanted]
    for task in known.values():
        if wanted in task.synonyms:
            return task
    from optimum.exporters.tasks import TasksManager

    if (mapped := TasksManager.map_from_synonym(wanted)) in known:
        return known[mapped]
    near = difflib.get_close_matches(wanted, known, n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise RequestError("unknown task", name, f"{hint}Known tasks: {', '.join(known)}")
