"""Building a bundle's files for GPUs that need not be there: to see whether NVIDIA's builder takes them, or to keep.

TensorRT for RTX builds for GPUs that are not there, and its parser and rules of types are those of TensorRT 11.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from exporter.artifact import Signature
from exporter.digests import file_digest
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
from exporter.targets.tensorrt_engine import write_engine_sheet
from pipelines.bundle import Bundle, read_bundle
from pipelines.integrity import changed_files, refuse
from pipelines.recipe_sections import parse_point
from pipelines.trust import remember_engine

TARGET, PLAN = "tensorrt-rtx", "model.plan"
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
        engine: Where the engine was kept; ``None`` where none was to be.
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
    engine: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "engine": None if self.engine is None else str(self.engine)}


def preflight(
    folder: Path,
    gpus: Sequence[str] = GPUS,
    *,
    out: Path | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> list[Preflight]:
    """Build every file of a bundle that is meant for TensorRT, for each of these GPUs.

    Args:
        folder: The bundle.
        gpus: Compute capabilities, as ``SM89``.
        out: A folder that is not there yet: for each engine it gets a folder with ``model.plan`` and the fingerprint,
            and the engines are trusted from then on. ``None``: nothing is kept.
        on_progress: Called with what is being built, how far it is.

    Raises:
        RequestError: No bundle, one whose files are not as written, or one without a file for TensorRT; an unknown
            GPU; `out` is there already.
        EnvironmentLackError: TensorRT for RTX is not installed.
    """
    say = on_progress or (lambda text: None)
    bundle = read_bundle(folder)
    files = _files(bundle)
    if out is not None and out.exists():
        raise RequestError("the folder for engines is there already", out, "Name another, or remove it")
    refuse(changed_files(bundle.path, files, bundle.manifest.files))
    profiles = profiles_of(bundle.signature, points_of(bundle.signature, bundle.points))
    found = []
    with tempfile.TemporaryDirectory(prefix=".planish-engines-", dir=_beside(out)) as scratch:
        made = Path(scratch) / "engines"
        for name, variant in files.items():
            for gpu in gpus:
                say(f"{variant} for {gpu}")
                place = made / f"{variant}-{gpu.lower()}"
                place.mkdir(parents=True)
                found.append(_try(bundle.path / name, name, variant, gpu, profiles, place, say))
                if out is None or not found[-1].ok:
                    shutil.rmtree(place)
        if out is None or not any(one.ok for one in found):
            return found
        for one in found:
            if one.ok:
                remember_engine(file_digest(made / _name(one) / PLAN))
        made.rename(out)
    return [replace(one, engine=out / _name(one) / PLAN if one.ok else None) for one in found]


def _name(one: Preflight) -> str:
    return f"{one.variant}-{one.gpu.lower()}"


def _beside(out: Path | None) -> Path | None:
    """Where engines are built that are kept: on the same disk, so that they can be moved into place at once."""
    if out is None:
        return None
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.parent


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
    path: Path,
    name: str,
    variant: str,
    gpu: str,
    profiles: Sequence[Shapes],
    place: Path,
    say: Callable[[str], None],
) -> Preflight:
    options = EngineOptions(compute_capabilities=(gpu,))
    try:
        built = build_engine(
            path,
            place / PLAN,
            module=RTX,
            profiles=profiles,
            options=options,
            on_progress=lambda text: say(f"{variant} for {gpu}: {text}"),
        )
    except (EnvironmentLackError, OptionError):
        raise
    except PlanishError as error:
        value = "" if error.value is None else f": {error.value}"
        return Preflight(variant, name, gpu, False, f"{error.what}{value}", error.remedy or "")
    write_engine_sheet(built, RTX, path, profiles, options)
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
