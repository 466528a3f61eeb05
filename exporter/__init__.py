"""One model in, one deployable artifact out: the single steps of which a run is composed.

>>> from exporter import get_target, get_task
>>> get_task("sentiment-analysis").name
'text-classification'
>>> get_target("onnxruntime-cpu").precisions
('fp32', 'int8', 'int4')
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporter.onnx_export import export_onnx
    from exporter.original import open_original
    from exporter.passes.optimize import optimize
    from exporter.precision.half import convert
    from exporter.sources import resolve_source
    from exporter.targets import get_target
    from exporter.tasks import get_task, infer_task
    from exporter.torch_export import export_program

__all__ = [
    "convert",
    "export_onnx",
    "export_program",
    "get_target",
    "get_task",
    "infer_task",
    "open_original",
    "optimize",
    "resolve_source",
]

_HOME = {
    "convert": "exporter.precision.half",
    "export_onnx": "exporter.onnx_export",
    "export_program": "exporter.torch_export",
    "get_target": "exporter.targets.base",
    "get_task": "exporter.tasks",
    "infer_task": "exporter.tasks",
    "open_original": "exporter.original",
    "optimize": "exporter.passes.optimize",
    "resolve_source": "exporter.sources",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: importing one step must not load the libraries of all of them.
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
