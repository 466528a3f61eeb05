"""Graph passes: each requires, applies and ensures something, and says what it changed and why."""

from exporter.passes.base import Change, Pass, PassContext, PassRecord, Pipeline, run_pass
from exporter.passes.optimize import default_pipeline, optimize

__all__ = [
    "Change",
    "Pass",
    "PassContext",
    "PassRecord",
    "Pipeline",
    "default_pipeline",
    "optimize",
    "run_pass",
]
