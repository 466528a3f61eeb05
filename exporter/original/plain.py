"""The request to open an original as plain data, so that other processes can open the same one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exporter.original.base import Original
from exporter.original.open import open_original
from exporter.sources.source import Source
from exporter.tasks.registry import Task, get_task


def original_arguments(
    source: Source,
    task: Task,
    *,
    max_batch: int | None = None,
    max_length: int | None = None,
    attends: bool = True,
    custom: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`open_original`'s arguments as JSON-able data."""
    return {
        "source": source.to_dict(),
        "task": task.name,
        "max_batch": max_batch,
        "max_length": max_length,
        "attends": attends,
        "custom": None if custom is None else dict(custom),
    }


def open_described(arguments: Mapping[str, Any]) -> Original:
    """Open what `original_arguments` describes.

    Raises:
        RequestError: As `open_original`.
    """
    return open_original(
        Source.from_dict(arguments["source"]),
        get_task(arguments["task"]),
        max_batch=arguments.get("max_batch"),
        max_length=arguments.get("max_length"),
        attends=bool(arguments.get("attends", True)),
        custom=arguments.get("custom"),
    )
