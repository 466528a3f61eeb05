"""Processes: every heavy step runs in a child that ends when this process does, however this process ends."""

from __future__ import annotations

from pipelines.processes.child import Child, Stopped, thread_environment
from pipelines.processes.failures import as_planish_error
from pipelines.processes.inside import report_progress
from pipelines.processes.jobs import JobResult, run_job
from pipelines.processes.tree import kill_all, terminable

__all__ = [
    "Child",
    "JobResult",
    "Stopped",
    "as_planish_error",
    "kill_all",
    "report_progress",
    "run_job",
    "terminable",
    "thread_environment",
]
