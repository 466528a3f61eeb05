"""Whether NVIDIA's builder takes a bundle's files, found out without a GPU: every one is really built, and thrown away.

TensorRT for RTX builds for GPUs that are not there, and its parser and rules of types are those of TensorRT 11.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from exporter.artifact import Signature
from exporter.errors import EnvironmentLackError, PlanishError, RequestError
from exporter.targets.tensorrt_builder import (
    RTX,
    BuiltEngine,
    EngineOptions,
    OptionError,
    Shapes,
    build_engine,
    profiles_of,
)
from pipelines.bundle import Bundle, read_bundle
from pipelines.integrity import changed_files, refuse
from pipelines.recipe_sections import parse_point

TARGET = "tensorrt-rtx"
GPUS = ("SM89", "SM120")
"""Ada and Blackwell: one generation with FP8 that many have, and the newest."""
PRODUCTS = ("gemm", "correlation")
"""Kinds of layers that are matrix products and convolutions."""


@dataclass(frozen=True)
class Preflight:
    """What became of one file for one GPU.

    Attributes:
        variant: The variant that the file is for.
        file: Relative to the bundle.
        gpu: Compute capability, as ``SM89``.
        ok: It was built.
        reason: Why not; empty where it was.
        remedy: What to do then.
        seconds: What the builder took.
        bytes: Size of the engine.
        layers: Its layers, by kind.
        products: Its matrix products and convolutions, by the type of their first input (TensorRT's name).
        warnings: The builder's.
    """

    variant: str
    file: str
    gpu: str
    ok: bool
    reason: str = ""
    remedy: str = ""
    seconds: float | None = None
    bytes: int | None = None
    layers: dict[str, int] = field(default_factory=dict)
    products: dict[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def preflight(
    folder: Path, gpus: Sequence[str] = GPUS, *, on_progress: Callable[[str], None] | None = None
) -> list[Preflight]:
    """Build every file of a bundle that is meant for TensorRT, for each of these GPUs.

    Args:
        folder: The bundle.
        gpus: Compute capabilities, as ``SM89``.
        on_progress: Called with what is being built, how far it is.

    Raises:
        RequestError: No bundle, one whose files are not as written, or one without a file for TensorRT; an unknown GPU.
        EnvironmentLackError: TensorRT for RTX is not installed.
    """
    say = on_progress or (lambda text: None)
    bundle = read_bundle(folder)
    files = _files(bundle)
    refuse(changed_files(bundle.path, files, bundle.manifest.files))
    profiles = profiles_of(bundle.signature, points_of(bundle.signature, bundle.points))
    found = []
    for name, variant in files.items():
        for gpu in gpus:
            say(f"{variant} for {gpu}")
            found.append(_try(bundle.path / name, name, variant, gpu, profiles, say))
    return found


def points_of(signature: Signature, points: Sequence[str]) -> list[dict[str, int]]:
    """Operating points as lengths of the signature's axes; what a point does not name has its smallest length."""
    length = signature.length
    found = []
    for point in points:
        batch, tokens = parse_point(point)
        lengths = {axis.name: axis.min for axis in signature.axes}
        if "batch" in lengths:
            lengths["batch"] = batch
        if tokens is not None and length is not None:
            lengths[length.name] = tokens
        found.append(lengths)
    return found


def _files(bundle: Bundle) -> dict[str, str]:
    """The ONNX files that are for TensorRT, and the variant that each is for."""
    entries = [entry for entry in bundle.manifest.variants if entry.target == TARGET and entry.files]
    files = {entry.files[0]: entry.id for entry in entries if (bundle.path / entry.files[0]).suffix == ".onnx"}
    if not files:
        raise RequestError(
            "the bundle has no file for TensorRT", bundle.path, f"Export with {TARGET} among the recipe's targets"
        )
    return files


def _try(
    path: Path, name: str, variant: str, gpu: str, profiles: Sequence[Shapes], say: Callable[[str], None]
) -> Preflight:
    with tempfile.TemporaryDirectory(prefix="planish-preflight-") as scratch:
        try:
            built = build_engine(
                path,
                Path(scratch) / "model.plan",
                module=RTX,
                profiles=profiles,
                options=EngineOptions(compute_capabilities=(gpu,)),
                on_progress=lambda text: say(f"{variant} for {gpu}: {text}"),
            )
        except (EnvironmentLackError, OptionError):
            raise
        except PlanishError as error:
            value = "" if error.value is None else f": {error.value}"
            return Preflight(variant, name, gpu, False, f"{error.what}{value}", error.remedy or "")
    return _passed(built, variant, name, gpu)


def _passed(built: BuiltEngine, variant: str, name: str, gpu: str) -> Preflight:
    products = [layer for layer in built.layers if layer.kind in PRODUCTS and layer.inputs]
    return Preflight(
        variant,
        name,
        gpu,
        True,
        seconds=built.seconds,
        bytes=built.bytes,
        layers=dict(Counter(layer.kind for layer in built.layers).most_common()),
        products=dict(Counter(layer.inputs[0] for layer in products).most_common()),
        warnings=built.warnings,
    )
