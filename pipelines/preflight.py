"""Building a bundle's files for GPUs that need not be there: to see whether NVIDIA's builder takes them, or to keep.

TensorRT for RTX builds for GPUs that are not there, and its parser and rules of types are those of TensorRT 11.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from exporter.digests import file_digest
from exporter.errors import InternalError, RequestError
from exporter.targets import get_target
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
from pipelines.disk import disk_errors, make_folder, sync_tree
from pipelines.integrity import changed_files, refuse
from pipelines.manifest import VariantEntry
from pipelines.plan import PORTABLE_FILES, points_of
from pipelines.processes import terminable
from pipelines.trust import remember_engine

TARGETS, PLAN = ("tensorrt-rtx", "tensorrt"), "model.plan"
GPUS = ("SM89", "SM120")
"""Ada and Blackwell: one generation with FP8 that many have, and the newest."""


@dataclass(frozen=True)
class Preflight:
    """What became of one file for one GPU.

    Attributes:
        variant: The variant that the file is for.
        file: Relative to the bundle.
        gpu: Compute capability, as ``SM89``.
        ok: It was built.
        crashed: The builder ended without an answer: that says nothing of the file.
        reason: Why it was not built; empty where it was.
        remedy: What to do then.
        seconds: What the builder took.
        bytes: Size of the engine.
        layers: Its layers, by kind.
        products: Its layers with a matrix product or a convolution, by the type that these multiply (TensorRT's name).
        warnings: The builder's.
        engine: Where the engine was kept; ``None`` where none was to be.
    """

    variant: str
    file: str
    gpu: str
    ok: bool
    crashed: bool = False
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
        gpus: Compute capabilities, as ``SM89`` or ``8.9``.
        out: A folder that is not there yet: for each engine it gets a folder with ``model.plan`` and the fingerprint,
            and the engines are trusted from then on. ``None``: nothing is kept.
        on_progress: Called with what is being built, how far it is.

    Raises:
        RequestError: No bundle, one whose files are not as written, or one without a file for TensorRT; an unknown
            GPU; `out` is there already.
        EnvironmentLackError: TensorRT for RTX is not installed, or a folder cannot be written.
    """
    say = on_progress or (lambda text: None)
    wanted = list(dict.fromkeys(map(capability, gpus)))
    bundle = read_bundle(folder)
    entries = _entries(bundle)
    if out is not None and os.path.lexists(out):
        raise RequestError("the folder for engines is there already", out, "Name another with --out, or remove it")
    _check(bundle, entries)
    profiles = profiles_of(bundle.signature, points_of(bundle.signature, bundle.points))
    found = []
    above, remedy = Path(tempfile.gettempdir()) if out is None else out.parent, "name another folder with --out"
    make_folder(above, remedy)
    with (
        terminable(),
        disk_errors(above, remedy),
        tempfile.TemporaryDirectory(prefix=".planish-engines-", dir=above) as scratch,
    ):
        made = Path(scratch) / "engines"
        for entry in entries:
            for gpu in wanted:
                say(f"{entry.id} for {gpu}")
                place = made / _folder(entry.id, gpu)
                place.mkdir(parents=True)
                found.append(
                    build_file(
                        bundle.files_of(entry),
                        gpu,
                        profiles,
                        place,
                        variant=entry.id,
                        name=entry.files[0],
                        keep=out is not None,
                        say=partial(_say, say, f"{entry.id} for {gpu}"),
                    )
                )
                if out is None or not found[-1].ok:
                    shutil.rmtree(place)
        if out is None or not any(one.ok for one in found):
            return found
        sync_tree(made)
        try:
            made.rename(out)
        except OSError as error:
            if not os.path.lexists(out):
                raise
            raise RequestError("another program made the folder for engines meanwhile", out, "Name another") from error
    found = [replace(one, engine=out / _folder(one.variant, one.gpu) / PLAN if one.ok else None) for one in found]
    for one in found:
        if one.engine is not None:
            remember_engine(file_digest(one.engine))
    return found


def _say(say: Callable[[str], None], what: str, text: str) -> None:
    say(f"{what}: {text}")


def capability(text: str) -> str:
    """``"SM89"``, also from ``"sm_89"`` and ``"8.9"``.

    Raises:
        RequestError: It is no compute capability.
    """
    found = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", text.strip(), re.IGNORECASE)
    if found is None:
        raise RequestError("not a compute capability", repr(text), f"As in --gpu {GPUS[0]}, or --gpu 8.9")
    return f"SM{found[1]}{found[2]}"


def _folder(variant: str, gpu: str) -> str:
    return f"{variant}-{gpu.lower()}"


def _entries(bundle: Bundle) -> list[VariantEntry]:
    """The variants whose files are for TensorRT: of those that share a file one, and none that failed."""
    entries = [entry for entry in bundle.manifest.variants if entry.target in TARGETS and entry.files]
    if not entries:
        advice = f"Export with {TARGETS[0]} among the recipe's targets"
        raise RequestError("the bundle has no file for TensorRT", bundle.path, advice)
    graphs = [_of_graph(bundle, entry) for entry in entries if entry.status != "failed"]
    sound = [entry for entry in graphs if entry.files and entry.files[0].endswith(".onnx")]
    if not sound:
        told = f"{entries[0].id}: {entries[0].reason}"
        raise RequestError("no file for TensorRT passed its gates", told, "planish inspect shows the gates")
    by_file: dict[str, VariantEntry] = {}
    for entry in sorted(sound, key=lambda entry: TARGETS.index(entry.target)):
        by_file.setdefault(entry.files[0], entry)
    return list(by_file.values())


def _of_graph(bundle: Bundle, entry: VariantEntry) -> VariantEntry:
    """The variant with the graph that its engine is built from, where its files are an engine."""
    if entry.files[0].endswith(".onnx"):
        return entry
    graph = PORTABLE_FILES.get(get_target(entry.target).ingredient(entry.variant), "")
    files = [name for name in (graph, f"{graph}_data") if name in bundle.manifest.files]
    return entry.model_copy(update={"files": tuple(files)})


def _check(bundle: Bundle, entries: Sequence[VariantEntry]) -> None:
    """Refuse files, weights beside a graph too, that are not as the manifest says, or that it does not list."""
    names = [name for entry in entries for name in entry.files]
    if unlisted := [name for name in names if name not in bundle.manifest.files]:
        raise RequestError("the manifest names a file that it does not list", unlisted[0], "Run planish verify")
    for entry in entries:
        bundle.files_of(entry)
    refuse(changed_files(bundle.path, names, bundle.manifest.files))


def build_file(
    files: Sequence[Path],
    gpu: str,
    profiles: Sequence[Shapes],
    place: Path,
    *,
    variant: str,
    name: str,
    keep: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Preflight:
    """Build one file for one GPU.

    Args:
        files: The ONNX file and those of its weights.
        gpu: Compute capability, as ``SM89``.
        profiles: The engine's optimization profiles.
        place: A folder for the engine.
        variant: What the file is for.
        name: What the file is called in the answer.
        keep: Write the engine's fingerprint beside it.
        say: Called with what the builder does.

    Raises:
        RequestError: The builder does not know the GPU.
        EnvironmentLackError: TensorRT for RTX is not installed.
    """
    options = EngineOptions(compute_capabilities=(gpu,))
    plan = place / PLAN
    try:
        built = build_engine(files[0], plan, module=RTX, profiles=profiles, options=options, on_progress=say)
    except OptionError as error:
        raise RequestError(
            "TensorRT for RTX does not build for a GPU", error.value, "Name one of those with --gpu"
        ) from None
    except (RequestError, InternalError) as error:
        value = "" if error.value is None else f": {error.value}"
        reason, crashed = f"{error.what}{value}", isinstance(error, InternalError)
        return Preflight(variant, name, gpu, False, crashed, reason, error.remedy or "")
    if keep:
        write_engine_sheet(built, RTX, files, profiles, options)
    return _passed(built, variant, name, gpu)


def _passed(built: BuiltEngine, variant: str, name: str, gpu: str) -> Preflight:
    return Preflight(
        variant,
        name,
        gpu,
        True,
        seconds=built.seconds,
        bytes=built.bytes,
        layers=dict(Counter(layer.kind for layer in built.layers).most_common()),
        products=dict(Counter(layer.product for layer in built.layers if layer.product is not None).most_common()),
        warnings=built.warnings,
    )
