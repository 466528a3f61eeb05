"""What models do: tasks, their registry, and how the task of a source is found."""

from __future__ import annotations

from exporter.tasks.infer import check_task, infer_task
from exporter.tasks.registry import Task, get_task, register_task, tasks

__all__ = ["Task", "check_task", "get_task", "infer_task", "register_task", "tasks"]
