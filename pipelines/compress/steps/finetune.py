"""The step ``finetune``: ordinary supervised training."""

from __future__ import annotations

from typing import Any

from pipelines.compress.sections import Finetune
from pipelines.compress.steps.desk import learn, open_desk


def finetune(arguments: dict[str, Any]) -> dict[str, Any]:
    """Train the model on the labels.

    Args:
        arguments: See `pipelines.compress.steps.desk.Desk`; ``step``: the recipe's.

    Returns:
        ``training`` and ``size``.
    """
    desk, settings = open_desk(arguments), Finetune(**arguments["step"])
    trained = learn(desk, desk.model, settings, None)
    return {"training": trained, "size": desk.save(desk.model)}


def head(arguments: dict[str, Any]) -> dict[str, Any]:
    """Give a model a new head for the classes of the data, which `finetune` trains.

    Args:
        arguments: ``source``, ``task``, ``labels``, ``seed``, ``folder``.
    """
    from pipelines.compress.models import MODEL, add_head

    desk = open_desk(arguments)
    add_head(desk.source, desk.task, arguments["labels"], desk.folder / MODEL, desk.seed)
    return {"labels": list(arguments["labels"])}
