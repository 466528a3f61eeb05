"""Opening a source, whatever its kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from exporter.errors import RequestError
from exporter.original.base import DEFAULT_MAX_BATCH, Original
from exporter.sources.source import Source
from exporter.tasks import Task, check_task


def open_original(
    source: Source,
    task: Task,
    *,
    max_batch: int | None = None,
    max_length: int | None = None,
    attends: bool = True,
    custom: Mapping[str, Any] | None = None,
) -> Original:
    """Open a source as the original: FP32, evaluation mode, inputs and outputs by name.

    Args:
        source: A resolved source; what it is trusted with was decided there.
        task: What the model is to do.
        max_batch: Largest batch that exports shall accept (default 1024).
        max_length: Longest sequence that they shall accept; never beyond the source's own limit, which is the default.
        attends: The caller promises that every row attends to at least one token.
        custom: For the task ``custom``: ``{"inputs": {name: {"dtype", "shape"}}, "outputs": [name, …], "axes": {name:
            {"min", "max"}}}``; shapes hold sizes and axis names. Without it axis 0 of every input is the dynamic axis
            ``batch`` and outputs keep the names under which the module returns them (``output_0`` … where it has none).

    Raises:
        RequestError: The source cannot be opened for this task; says why.
    """
    check_task(source, task)
    if custom and task.name != "custom":
        raise RequestError("declared inputs and outputs belong to the task custom", task.name, "Drop one of the two")
    for name, value in (("max_batch", max_batch), ("max_length", max_length)):
        if value is not None and value < 1:
            raise RequestError(f"{name} must be at least 1", value)
    opener = _OPENERS[source.kind]
    return opener(
        source,
        task,
        max_batch=max_batch or DEFAULT_MAX_BATCH,
        max_length=max_length,
        attends=attends,
        custom=custom,
    )


def _open_folder(source: Source, task: Task, **options: Any) -> Original:
    from exporter.original.huggingface import open_folder

    options.pop("custom")
    return open_folder(source, task, **options)


def _open_factory(source: Source, task: Task, **options: Any) -> Original:
    from exporter.original.modules import open_factory

    return open_factory(source, task, **options)


def _open_program(source: Source, task: Task, **options: Any) -> Original:
    from exporter.original.modules import open_program

    return open_program(source, task, **options)


def _open_onnx(source: Source, task: Task, **options: Any) -> Original:
    from exporter.original.onnx import open_onnx

    return open_onnx(source, task, **options)


_OPENERS: dict[str, Callable[..., Original]] = {
    "huggingface": _open_folder,
    "package": _open_folder,
    "factory": _open_factory,
    "pt2": _open_program,
    "onnx": _open_onnx,
}
