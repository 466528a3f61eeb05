"""``planish doctor``: what this machine has, which targets can run on it, and what the others need.

Packages are asked of their metadata, so that looking is quick, harms nothing and loads no CUDA. Only a target that is
installed may ask its own runtime what the processor can do.
"""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from exporter.hardware import probe
from exporter.targets.base import Availability, Target, targets
from exporter.targets.nvidia import NvidiaTarget
from pipelines.cache import Cache, Entry
from pipelines.cli.screens import Screen
from pipelines.report.formats import size

_EXTRA = re.compile(r"""extra\s*==\s*['"]([\w.-]+)['"]""")
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*")
# What only people who change Planish itself need.
_NOT_FOR_USERS = {"dev"}
Lack = tuple[str, str]
"""What is missing, and how to get it."""


def describe_machine() -> dict[str, Any]:
    """Look at the machine, without side effects.

    Returns:
        ``machine`` (see `exporter.hardware.probe`), ``targets`` (``name``, ``available``, ``reason``, ``remedy``,
        ``missing``: the same one by one, ``versions``, and in ``variants`` the same for each variant that cannot run
        though its target can),
        ``packages`` (``name``, ``version`` or null, ``required``: a range, ``fits``: the version is in it, ``core``,
        ``extras``), ``cache`` (``root``, ``size_bytes``, ``entries``, ``free_bytes`` of its disk).
    """
    cache = Cache()
    entries: list[Entry] = cache.ls()
    return {
        "planish_version": _installed("planish"),
        "machine": probe(),
        "targets": [_describe_target(target) for target in targets().values()],
        "packages": _packages(),
        "cache": {
            "root": str(cache.root),
            "size_bytes": sum(entry.size_bytes for entry in entries),
            "entries": len(entries),
            "free_bytes": _free_bytes(cache.root),
        },
    }


def show_machine(found: dict[str, Any]) -> None:
    """Print what `describe_machine` found as a screen."""
    screen = Screen()
    machine = found["machine"]
    screen.heading("Machine")
    screen.pairs(
        [
            ("Processor", _processor(machine["cpu"])),
            ("Memory", _memory(machine)),
            ("GPU", _gpu(machine["gpu"])),
            ("System", machine["os"]),
            ("Python", machine["python"]),
        ]
    )
    screen.heading("Targets")
    told = _available_first(found["targets"])
    common = _common(told)
    screen.table(None, [row for target in told for row in _target_rows(target, common)])
    for (what, remedy), names in common.items():
        screen.line(f"{', '.join(names[:-1])} and {names[-1]}: {what}", "unavailable")
        screen.line(remedy)
    screen.heading("Packages")
    screen.table(("Name", "Version", "Needed", "Extra", ""), [_package_row(package) for package in found["packages"]])
    if lacking := [p["name"] for p in found["packages"] if p["core"] and (p["version"] is None or p["fits"] is False)]:
        screen.line(f"Planish needs {', '.join(lacking)}: pip install --upgrade planish", "missing")
    screen.heading("Cache")
    cache = found["cache"]
    free = "" if cache["free_bytes"] is None else f"; {size(cache['free_bytes'])} free on its disk"
    screen.line(f"{size(cache['size_bytes'])} in {cache['entries']} entries{free}")
    screen.line(cache["root"])
    screen.show()


def _describe_target(target: Target) -> dict[str, Any]:
    whole = _ask(target)
    described = {
        "name": target.name,
        **_as_dict(whole),
        "missing": [{"what": what, "remedy": remedy} for what, remedy in _missing(target, whole)],
        "precisions": list(target.precisions),
        "variants": [],
    }
    if whole.available:
        for variant in target.variants(target.precisions):
            state = _ask(target, variant)
            if not state.available:
                described["variants"].append({"id": variant.id, **_as_dict(state)})
    return described


def _ask(target: Target, *variant: Any) -> Availability:
    try:
        return target.availability(*variant)
    except (ImportError, OSError, RuntimeError) as error:  # a package that is there and does not load
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return Availability(False, f"its package is broken: {first}", "Install it again")


def _missing(target: Target, whole: Availability) -> list[Lack]:
    if whole.available:
        return []
    if isinstance(target, NvidiaTarget):
        with suppress(ImportError, OSError, RuntimeError):  # the reason tells of it
            return target.missing() or [(whole.reason, whole.remedy)]
    return [(whole.reason, whole.remedy)]


def _as_dict(state: Availability) -> dict[str, Any]:
    return {
        "available": state.available,
        "reason": state.reason,
        "remedy": state.remedy,
        "versions": dict(state.versions),
    }


def _packages() -> list[dict[str, Any]]:
    """The packages that Planish and its extras ask for, as its own metadata names them, each once."""
    try:
        required = metadata.requires("planish") or []
    except metadata.PackageNotFoundError:  # run from its source, never installed
        return []
    packages: dict[str, dict[str, Any]] = {}
    for text in required:
        requirement, _, marker = text.partition(";")
        extra = found.group(1) if (found := _EXTRA.search(marker)) else None
        named = _NAME.match(requirement.strip())
        if named is None or extra in _NOT_FOR_USERS:
            continue
        name = named.group()
        wanted = requirement.strip()[len(name) :].strip()
        version = _installed(name)
        package = packages.setdefault(
            name,
            {"name": name, "version": version, "required": wanted, "fits": _fits(version, wanted), "core": False}
            | {"extras": []},
        )
        if extra is None:
            package["core"] = True
        else:
            package["extras"].append(extra)
    return list(packages.values())


def _fits(version: str | None, wanted: str) -> bool | None:
    """Whether a version is in the range asked for; null where that cannot be told."""
    try:
        from packaging.specifiers import InvalidSpecifier, SpecifierSet
        from packaging.version import InvalidVersion, Version
    except ImportError:
        return None
    try:
        return None if version is None else SpecifierSet(wanted).contains(Version(version), prereleases=True)
    except (InvalidSpecifier, InvalidVersion):
        return None


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _free_bytes(root: Path) -> int | None:
    existing = next((path for path in (root, *root.parents) if path.is_dir()), None)
    try:
        return None if existing is None else shutil.disk_usage(existing).free
    except OSError:
        return None


def _processor(cpu: dict[str, Any]) -> str:
    cores = f"{cpu['cores']} cores, " if cpu["cores"] else ""
    parts = [f"{cpu['model']} ({cpu['architecture']}; {cores}{cpu['threads']} threads"]
    if len(cpu["affinity"]) < cpu["threads"]:
        parts.append(f", {len(cpu['affinity'])} usable")
    if cpu["quota"] is not None:
        parts.append(f", a container allows {cpu['quota']:g}")
    parts.append(")")
    if wide := [name for name in cpu["features"] if name.startswith(("avx512_vnni", "avx512_bf16", "amx_", "i8mm"))]:
        parts.append(f" with {', '.join(wide)}")
    return "".join(parts)


def _memory(machine: dict[str, Any]) -> str:
    limit = machine["memory_limit_bytes"]
    total = size(machine["memory_bytes"])
    return total if limit is None or limit >= machine["memory_bytes"] else f"{total}, a container allows {size(limit)}"


def _gpu(gpu: dict[str, Any]) -> str:
    if not gpu["available"]:
        return f"none ({gpu['reason']})"
    devices = [
        f"{device['name']} ({size(device['memory_bytes'])}, compute capability {device['compute_capability']})"
        for device in gpu["devices"]
    ]
    return "\n".join([*devices, f"driver {gpu['driver']}"])


def _available_first(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(found, key=lambda target: not target["available"])


def _common(found: list[dict[str, Any]]) -> dict[Lack, list[str]]:
    """What several targets lack alike, with their names: it is told once, below the table."""
    lacking: dict[Lack, list[str]] = {}
    for target in found:
        for lack in _lacks(target):
            lacking.setdefault(lack, []).append(target["name"])
    return {lack: names for lack, names in lacking.items() if len(names) > 1}


def _lacks(target: dict[str, Any]) -> list[Lack]:
    return [(one["what"], one["remedy"]) for one in target["missing"]]


def _target_rows(target: dict[str, Any], common: dict[Lack, list[str]]) -> list[tuple[str, str, str]]:
    versions = ", ".join(f"{name} {version}" for name, version in target["versions"].items())
    if not target["available"]:
        own = [_why(*lack) for lack in _lacks(target) if lack not in common]
        installed = f"{versions} is installed; " if versions else ""
        return [(target["name"], "unavailable", "\n".join(own) or f"{installed}what is missing is told below")]
    return [
        (target["name"], "available", versions),
        *((variant["id"], "unavailable", _why(variant["reason"], variant["remedy"])) for variant in target["variants"]),
    ]


def _why(what: str, remedy: str) -> str:
    return f"{what}\n{remedy}" if remedy else what


def _package_row(package: dict[str, Any]) -> tuple[str, str, str, str, str]:
    if package["version"] is None:
        state = "missing" if package["core"] else "not installed"
    else:
        state = "unfit" if package["fits"] is False else ""
    return package["name"], package["version"] or "", package["required"], ", ".join(package["extras"]), state
