"""Stage: export the original to ONNX, and to a `torch.export` program where a target compiles one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.processes import report_progress
from pipelines.stages.opening import open_from


def export(arguments: dict[str, Any]) -> dict[str, Any]:
    """Export.

    Args:
        arguments: ``original`` (what to open), ``opset``, ``program`` (whether the torch.export program is wanted too),
            ``folder``.

    Returns:
        ``onnx`` and, where wanted, ``program``: artifacts whose paths are relative to the folder.
    """
    from exporter.onnx_export import export_onnx, import_onnx
    from exporter.torch_export import export_program

    folder = Path(arguments["folder"])
    report_progress("opening the original")
    original = open_from(arguments)
    result: dict[str, Any] = {}
    if original.module is None:
        result["onnx"] = import_onnx(original, folder / "onnx")
    else:
        report_progress("tracing to ONNX")
        result["onnx"] = export_onnx(original, folder / "onnx", opset=int(arguments["opset"]))
        if arguments["program"]:
            report_progress("tracing to torch.export")
            result["program"] = export_program(original, folder / "program")
    return {kind: relative(artifact, folder) for kind, artifact in result.items()}


def relative(artifact: Any, folder: Path) -> dict[str, Any]:
    """An artifact as plain data, its path relative to the stage's folder, which moves when the stage is done."""
    data: dict[str, Any] = artifact.to_dict()
    return {**data, "path": str(artifact.path.relative_to(folder))}
