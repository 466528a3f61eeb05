"""Which task a source is for, read from its configuration; and whether it can serve the task that was asked for."""

from __future__ import annotations

from typing import Any

from exporter.errors import RequestError
from exporter.sources.source import Source
from exporter.tasks.registry import Task, get_task, tasks

# Class names that end in "Model" and still carry a head.
_NO_BARE_MODEL = ("LMHeadModel", "DoubleHeadsModel", "EncoderDecoderModel")


def infer_task(source: Source) -> Task:
    """The task that the source is for.

    A sentence-transformers folder (``modules.json``) and a bare encoder mean feature extraction; a head named in the
    config's ``architectures`` means the head's task. An ONNX file goes by the configuration beside it too, where its
    outputs bear the task's names; else it is ``custom``, as a factory and a program are.

    Raises:
        RequestError: The configuration names no architecture, several, or one that leaves the choice open; lists the
            choices.
    """
    if source.kind == "onnx":
        return _task_of_onnx(source)
    if not source.is_folder:
        return get_task("custom")
    if _pools(source):
        return get_task("feature-extraction")
    architectures = _architectures(source)
    if not architectures:
        raise RequestError("the task cannot be inferred: config.json names no architectures", source.path, _choices())
    found = {architecture: _task_of(architecture) for architecture in architectures}
    names = {task.name for task in found.values() if task is not None}
    if len(names) == 1 and None not in found.values():
        return get_task(names.pop())
    raise RequestError(
        "the task cannot be inferred: the model's architecture leaves it open", ", ".join(architectures), _choices()
    )


def check_task(source: Source, task: Task) -> None:
    """Refuse a task whose head the source's architecture does not have: its weights would be random.

    Raises:
        RequestError: Names the architecture and the task that fits it.
    """
    if not source.is_folder:
        if task.name != "custom" and source.kind != "onnx":
            raise RequestError(f"a source of kind {source.kind!r} has the task custom", task.name, "Leave the task out")
        return
    if task.name == "custom":
        raise RequestError("a model folder cannot have the task custom", source.spec, _choices())
    if task.name == "feature-extraction":
        return  # every encoder has hidden states; a head on top is left out
    fitting = [found.name for name in _architectures(source) if (found := _task_of(name)) is not None]
    if fitting and task.name not in fitting:
        raise RequestError(
            f"the model has no head for {task.name}: its weights would be random",
            ", ".join(_architectures(source)),
            f"Its task is {fitting[0]}",
        )


def _task_of_onnx(source: Source) -> Task:
    import onnx

    outputs = {value.name for value in onnx.load(str(source.path), load_external_data=False).graph.output}
    if _pools(source):
        found = {get_task("feature-extraction")}
    else:
        found = {task for name in _architectures(source) if (task := _task_of(name)) is not None}
    task = found.pop() if len(found) == 1 else get_task("custom")
    return task if outputs & set(task.outputs) else get_task("custom")


def _pools(source: Source) -> bool:
    """Whether ``modules.json`` puts a pooling behind the encoder: a sentence-transformers embedding model."""
    modules = source.json("modules.json")
    if not isinstance(modules, list):
        return False
    return any(isinstance(module, dict) and str(module.get("type", "")).endswith(".Pooling") for module in modules)


def _architectures(source: Source) -> list[str]:
    config: dict[str, Any] = source.json("config.json") or {}
    names = config.get("architectures") or []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _task_of(architecture: str) -> Task | None:
    if architecture.endswith(_NO_BARE_MODEL):
        return None
    return next((t for t in tasks().values() if architecture.endswith(t.architecture_suffixes or ("\0",))), None)


def _choices() -> str:
    return f"Name it with --task: {', '.join(name for name in tasks() if name != 'custom')}"
