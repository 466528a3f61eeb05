"""Opening the original inside a job, from the plain data that a run passes around."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporter.original import Original


def open_from(arguments: dict[str, Any]) -> Original:
    """Open the original that `arguments["original"]` describes (see `pipelines.plan.original_arguments`)."""
    from exporter.original import open_original
    from exporter.sources import Source
    from exporter.tasks import get_task

    asked = arguments["original"]
    return open_original(
        Source.from_dict(asked["source"]),
        get_task(asked["task"]),
        max_length=asked["max_length"],
        max_batch=asked["max_batch"],
        attends=asked["attends"],
        custom=asked["custom"],
    )
