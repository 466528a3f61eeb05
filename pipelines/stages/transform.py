"""Stages that make one ONNX file from another: graph passes, fusion, half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exporter.artifact import Artifact
from pipelines.processes import report_progress
from pipelines.stages.samples import read_samples

MODEL = "model.onnx"


def optimize(arguments: dict[str, Any]) -> dict[str, Any]:
    """Run the graph passes, checked on real inputs.

    Args:
        arguments: ``artifact``, ``samples`` (file of inputs), ``fuse`` (fuse for ONNX Runtime), ``folder``.

    Returns:
        ``path`` relative to the folder, and ``record``: what each pass changed and why.
    """
    from exporter.passes import optimize as run_passes

    artifact = Artifact.from_dict(arguments["artifact"])
    report_progress("fusing for ONNX Runtime" if arguments["fuse"] else "graph passes")
    record = run_passes(
        artifact.path,
        Path(arguments["folder"]) / MODEL,
        contract=artifact.contract,
        samples=read_samples(Path(arguments["samples"])),
        fuse=bool(arguments["fuse"]),
    )
    return {"path": MODEL, "record": record}


def lower(arguments: dict[str, Any]) -> dict[str, Any]:
    """Convert to FP16 or BF16, strongly typed; for BF16 also the FP32 emulation that parity is checked on here.

    Args:
        arguments: ``artifact``, ``precision``, ``folder``.

    Returns:
        ``path``, ``record`` (every node kept in FP32 and why), and ``emulation`` (path or null).
    """
    from exporter.precision import convert, emulate_bf16

    artifact, folder = Artifact.from_dict(arguments["artifact"]), Path(arguments["folder"])
    precision = arguments["precision"]
    report_progress(f"converting to {precision}")
    record = convert(artifact.path, folder / MODEL, precision=precision, contract=artifact.contract)
    emulation = None
    if precision == "bf16":
        emulation = "emulation/model.onnx"
        (folder / "emulation").mkdir()
        record = {**record, "emulation": emulate_bf16(folder / MODEL, folder / emulation)}
    return {"path": MODEL, "record": record, "emulation": emulation}


def build(arguments: dict[str, Any]) -> dict[str, Any]:
    """Let a target build what it opens.

    Args:
        arguments: ``artifact``, ``target``, ``precision``, ``form``, ``folder``.

    Returns:
        ``files`` relative to the folder, the one to open first, and ``digest``: its SHA-256.
    """
    from exporter.artifact import Variant
    from exporter.targets import get_target
    from exporter.targets.inductor import file_digest

    folder = Path(arguments["folder"])
    variant = Variant(arguments["target"], arguments["precision"], arguments["form"])
    report_progress(f"compiling {variant.id}")
    files = get_target(variant.target).build(Artifact.from_dict(arguments["artifact"]), variant, folder)
    return {"files": [str(path.relative_to(folder)) for path in files], "digest": file_digest(files[0])}
