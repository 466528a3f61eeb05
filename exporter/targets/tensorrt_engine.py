"""Whether a TensorRT engine runs here: what it was built for, what this machine has, and where the two part.

Deserializing runs code of the engine, and one of another version or GPU may end the process. So nothing of it is read
before these checks.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

from exporter.digests import file_digest
from exporter.hardware import gpu
from exporter.targets.engines import check_sheet, write_sheet
from exporter.targets.packages import installed_version
from exporter.targets.tensorrt_builder import RTX, TENSORRT, BuiltEngine, EngineOptions, Shapes

PACKAGES = {RTX: ("tensorrt-rtx-cu13", "tensorrt-rtx"), TENSORRT: ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")}
"""By module, the distributions that bring it."""
FIELDS = {
    "library": str,
    "version": str,
    "platform": str,
    "gpus": list,
    "options": dict,
    "profiles": list,
    "onnx": dict,
}
AMPERE = (8, 0)
_NOT_OF_THE_ENGINE = ("compute_capabilities", "timing_cache", "timeout_s", "memory_bytes")


def engine_fingerprint(
    built: BuiltEngine, module: str, files: Sequence[Path], profiles: Sequence[Shapes], options: EngineOptions
) -> dict[str, Any]:
    """What an engine depends on.

    Args:
        built: The engine.
        module: What built it.
        files: The ONNX file and those of its weights.
        profiles: Its optimization profiles.
        options: How it was built.

    Returns:
        ``library`` and its ``version``; ``platform``; ``gpus``: compute capabilities (``"8.9"``); ``device`` and
        ``driver``, where it was built for a GPU of this machine; ``options`` that are not the default; ``profiles``;
        ``onnx``: by name, the SHA-256 of the files that it was built from.
    """
    plain = EngineOptions()
    names = [field.name for field in fields_of(EngineOptions) if field.name not in _NOT_OF_THE_ENGINE]
    found: dict[str, Any] = {
        "library": module,
        "version": built.version,
        "platform": _platform(),
        "gpus": [capability_of(name) for name in options.compute_capabilities],
        "options": {name: getattr(options, name) for name in names if getattr(options, name) != getattr(plain, name)},
        "profiles": [{name: [list(shape) for shape in shapes] for name, shapes in one.items()} for one in profiles],
        "onnx": {path.name: file_digest(path) for path in files},
    }
    if not options.compute_capabilities:
        here = this_machine(module)
        found |= {"gpus": [here["gpu"]], "device": here["device"], "driver": here["driver"]}
    return found


def write_engine_sheet(
    built: BuiltEngine, module: str, files: Sequence[Path], profiles: Sequence[Shapes], options: EngineOptions
) -> Path:
    """Write the fingerprint beside an engine; returns the file. Arguments as for `engine_fingerprint`."""
    return write_sheet(built.plan, engine_fingerprint(built, module, files, profiles, options))


def check_engine(engine: Path, trusted_digests: frozenset[str]) -> None:
    """Refuse an engine that is not whole, does not fit this machine or is not trusted; nothing of it is loaded.

    Raises:
        RequestError: Says what differs and what would mend it.
    """

    def unfit(built: dict[str, Any]) -> list[str]:
        return misfits(built, this_machine(built["library"]))

    check_sheet(engine, trusted_digests, unfit, FIELDS)


def capability_of(name: str) -> str:
    """``"SM89"`` as ``"8.9"``, ``"SM120"`` as ``"12.0"``."""
    digits = name.removeprefix("SM")
    return f"{digits[:-1]}.{digits[-1]}"


def this_machine(module: str) -> dict[str, Any]:
    """What engines of a library would meet here.

    Returns:
        ``version`` of the library (empty: not installed), ``platform``, ``gpu`` (compute capability of the first GPU),
        ``device`` (its name) and ``driver``, each ``None`` where there is none.
    """
    found = gpu()
    device = found["devices"][0] if found["devices"] else {}
    return {
        "version": installed_version(*PACKAGES.get(module, (module,))) or "",
        "platform": _platform(),
        "gpu": device.get("compute_capability"),
        "device": device.get("name"),
        "driver": found["driver"],
    }


def misfits(built: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What keeps an engine from running here, one phrase each; empty when it fits.

    Versions must be the same, or within one major version not older where the engine is version-compatible. The GPU
    must be one of those built for; an engine that was built on a GPU also asks for its model, as kernels were timed
    there. ``hardware_compatible`` widens both.
    """
    told = []
    options = built["options"]
    if not here["version"]:
        told.append(f"{built['library']} {built['version']} is needed, and is not installed here")
    elif not _version_fits(built["version"], here["version"], bool(options.get("version_compatible"))):
        told.append(f"{built['library']}: built with {built['version']}, here it is {here['version']}")
    if built["platform"] != here["platform"]:
        told.append(f"platform: built for {built['platform']}, here it is {here['platform']}")
    needed = " or ".join(built["gpus"])
    if here["gpu"] is None:
        told.append(f"a GPU of compute capability {needed} is needed, and there is none here")
        return told
    level = options.get("hardware_compatible")
    if not _gpu_fits(built["gpus"], here["gpu"], level):
        told.append(f"GPU: built for compute capability {needed}, here it is {here['gpu']}")
    elif built.get("device") and level is None and built["device"] != here["device"]:
        told.append(f"GPU: built on {built['device']}, here it is {here['device']}")
    if built.get("driver") and here["driver"] and _numbers(here["driver"]) < _numbers(built["driver"]):
        told.append(f"driver: built with {built['driver']}, here it is the older {here['driver']}")
    return told


def _version_fits(built: str, here: str, compatible: bool) -> bool:
    if not compatible:
        return built == here
    return _numbers(built)[:1] == _numbers(here)[:1] and _numbers(here) >= _numbers(built)


def _gpu_fits(gpus: Sequence[str], here: str, level: str | None) -> bool:
    if level == "AMPERE_PLUS":
        return _numbers(here) >= AMPERE
    return here in gpus


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _platform() -> str:
    return f"{platform.system().lower()} {platform.machine()}"
