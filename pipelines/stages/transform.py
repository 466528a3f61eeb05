"""Stages that make one artifact from another: graph passes, fusion, half precision, compiled engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exporter.artifact import Artifact, Variant
from pipelines.processes import report_progress
from pipelines.stages.files import external_data, read_case_inputs

# Files get the names that they have in a bundle: a graph names the file of its weights, so it cannot be renamed later.
MODEL = "model.onnx"
FUSED = "model_fused.onnx"
EMULATION = "emulation/model.onnx"
MOST_SAMPLES = 6


def optimize(arguments: dict[str, Any]) -> dict[str, Any]:
    """Run the graph passes, each checked on real inputs.

    Args:
        arguments: ``artifact``, ``recorded`` (folder of the record stage), ``fuse`` (for ONNX Runtime),
            ``external_data`` (``auto`` or ``always``), ``folder``.

    Returns:
        ``path`` relative to the folder, and ``record``: what each pass changed and why.
    """
    from exporter.passes import optimize as run_passes

    artifact = Artifact.from_dict(arguments["artifact"])
    name = FUSED if arguments["fuse"] else MODEL
    report_progress("fusing for ONNX Runtime" if arguments["fuse"] else "running graph passes")
    record = run_passes(
        artifact.path,
        Path(arguments["folder"]) / name,
        contract=artifact.contract,
        samples=read_case_inputs(Path(arguments["recorded"]), MOST_SAMPLES),
        fuse=bool(arguments["fuse"]),
        external_data=external_data(arguments),
    )
    return {"path": name, "record": record}


def lower(arguments: dict[str, Any]) -> dict[str, Any]:
    """Convert to FP16 or BF16, strongly typed, with the FP32 emulation that shows every rounding on a CPU.

    ONNX Runtime has no BF16 kernels on a CPU, and skips roundings of FP16 models where it has no FP16 kernels.

    Args:
        arguments: ``artifact``, ``precision``, ``ranges`` (the file of the stage that measured, or null), ``measured``
            (its record), ``external_data`` (``auto`` or ``always``), ``folder``.

    Returns:
        ``path``, ``emulation`` (both relative to the folder), ``record``: every node kept in FP32 and why, and over how
        much data they were measured.
    """
    from calibration.half_ranges import load_half_ranges
    from exporter.precision.emulate import emulate_half
    from exporter.precision.half import convert

    artifact, folder = Artifact.from_dict(arguments["artifact"]), Path(arguments["folder"])
    precision = arguments["precision"]
    report_progress(f"converting to {precision}")
    name = f"model_{precision}.onnx"
    ranges = None if arguments["ranges"] is None else load_half_ranges(Path(arguments["ranges"])).ranges
    record = convert(
        artifact.path,
        folder / name,
        precision=precision,
        contract=artifact.contract,
        ranges=ranges,
        external_data=external_data(arguments),
    )
    record["measured"] = arguments["measured"]
    (folder / EMULATION).parent.mkdir()
    emulation = emulate_half(folder / name, folder / EMULATION, precision=precision)
    return {"path": name, "emulation": EMULATION, "record": {**record, "emulation": emulation}}


def build(arguments: dict[str, Any]) -> dict[str, Any]:
    """Let a target build what it opens.

    Args:
        arguments: ``artifact``, ``variant``, ``how`` (``points`` and ``options``, see `BuildHow`), ``folder``.

    Returns:
        ``files`` relative to the folder, the one to open first, and ``digest``: its SHA-256.
    """
    from exporter.digests import file_digest
    from exporter.targets import get_target
    from exporter.targets.base import BuildHow

    folder = Path(arguments["folder"])
    variant = Variant(**arguments["variant"])
    report_progress(f"compiling {variant.id}")
    artifact, how = Artifact.from_dict(arguments["artifact"]), BuildHow(**arguments["how"])
    files = get_target(variant.target).build(artifact, variant, folder, how)
    return {"files": [str(path.relative_to(folder)) for path in files], "digest": file_digest(files[0])}
