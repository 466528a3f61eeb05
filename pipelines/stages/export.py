"""Stages: export the original to ONNX, and to the `torch.export` program that compilers take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.processes import report_progress
from pipelines.stages.files import external_data

if TYPE_CHECKING:
    from exporter.artifact import Artifact


def to_onnx(arguments: dict[str, Any]) -> dict[str, Any]:
    """Export to ONNX; an ONNX source is taken as it is.

    Args:
        arguments: ``original`` (what to open), ``opset``, ``external_data`` (``auto`` or ``always``), ``folder``.

    Returns:
        ``artifact``, its path relative to the folder.
    """
    from exporter.onnx_export import export_onnx, import_onnx
    from exporter.original import open_described

    folder = Path(arguments["folder"])
    report_progress("opening the original")
    original = open_described(arguments["original"])
    if original.module is None:
        return _relative(import_onnx(original, folder), folder)
    report_progress("tracing to ONNX")
    beside = external_data(arguments)
    return _relative(export_onnx(original, folder, opset=int(arguments["opset"]), external_data=beside), folder)


def to_program(arguments: dict[str, Any]) -> dict[str, Any]:
    """Export to a `torch.export` program.

    Args:
        arguments: ``original``, ``precision``, ``folder``.

    Returns:
        ``artifact``, its path relative to the folder.
    """
    from exporter.original import open_described
    from exporter.torch_export import export_program

    folder = Path(arguments["folder"])
    report_progress("tracing to torch.export")
    original = open_described(arguments["original"])
    return _relative(export_program(original, folder, precision=arguments["precision"]), folder)


def _relative(artifact: Artifact, folder: Path) -> dict[str, Any]:
    return {"artifact": {**artifact.to_dict(), "path": str(artifact.path.relative_to(folder))}}
