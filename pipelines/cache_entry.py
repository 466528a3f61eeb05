"""One entry of the stage cache: what a stage is identified by, what it left, and whether that is still as it was."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from exporter.digests import file_digest
from exporter.errors import InternalError
from pipelines.code_digest import code_digest
from pipelines.digests import canonical_json, json_digest, walk_files
from pipelines.disk import write_durably

RECORD = "record.json"
_STAGE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}")


@dataclass(frozen=True)
class StageKey:
    """What the result of a stage depends on, all of it plain JSON data. Build it with `stage_key`.

    Attributes:
        stage: The stage's name, for people and for folder names.
        inputs: Digests of what the stage reads, and its parameters.
        code: Digest of its code (see `pipelines.code_digest`).
        packages: Version per package that its result depends on.
        environment: For stages that compile or measure: hardware, compiler, threads, environment variables.
    """

    stage: str
    inputs: Mapping[str, Any]
    code: str
    packages: Mapping[str, str | None] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "inputs": dict(self.inputs),
            "code": self.code,
            "packages": dict(self.packages),
            "environment": dict(self.environment),
        }

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON of all of it."""
        try:
            return json_digest(self.to_dict())
        except (TypeError, ValueError) as error:
            raise InternalError("a stage's key is not plain data", f"{self.stage} ({error})") from error

    @property
    def id(self) -> str:
        """``<stage>-<first 32 digits of the digest>``: the name of the entry."""
        return f"{self.stage}-{self.digest[:32]}"


def stage_key(
    stage: str,
    *,
    inputs: Mapping[str, Any],
    code: Callable[..., Any] | str | Iterable[Callable[..., Any] | str],
    packages: Iterable[str] = (),
    environment: Mapping[str, Any] | None = None,
    variables: Iterable[str] = (),
) -> StageKey:
    """The key of a stage.

    Args:
        stage: Lower-case name.
        inputs: Digests of what it reads (never paths) and its parameters.
        code: The function or functions that do the work, as objects, module names or ``module:function``.
        packages: Distributions whose version matters; Python's own version always does.
        environment: For stages that compile or measure: hardware fingerprint, compiler, threads.
        variables: Names of environment variables that matter.
    """
    if not _STAGE_NAME.fullmatch(stage):
        raise InternalError("not a name for a stage", stage)
    codes = (code,) if callable(code) or isinstance(code, str) else tuple(code)
    versions = {name: package_version(name) for name in sorted(set(packages))}
    versions["python"] = ".".join(map(str, sys.version_info[:3]))
    around = dict(environment or {})
    if names := sorted(set(variables)):
        around["variables"] = {name: os.environ.get(name) for name in names}
    return StageKey(stage, dict(inputs), code_digest(*codes), versions, around)


@cache
def package_version(name: str) -> str | None:
    """Version of an installed distribution, or `None`."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_record(folder: Path, key: StageKey, result: dict[str, Any], seconds: float, created: str) -> dict[str, Any]:
    """Write the record beside what the stage left in `folder`.

    Raises:
        InternalError: The stage left a link or a record of its own, or its result is not plain data or names
            `folder`, which is about to be renamed.
    """
    files: dict[str, dict[str, Any]] = {}
    for path in walk_files(folder):
        name = path.relative_to(folder).as_posix()
        state = path.lstat()
        if not stat.S_ISREG(state.st_mode) or name == RECORD:
            raise InternalError(f"stage {key.stage!r} left something that the cache cannot keep", name)
        files[name] = {"bytes": state.st_size, "mtime_ns": state.st_mtime_ns, "sha256": file_digest(path)}
    record = {
        "schema_version": 1,
        "key": key.to_dict(),
        "created": created,
        "seconds": round(seconds, 3),
        "files": files,
        "result": result,
    }
    try:
        text = canonical_json(record)
    except (TypeError, ValueError) as error:
        raise InternalError(f"stage {key.stage!r} returned what is not plain data", error) from error
    if os.fsencode(folder) in canonical_json(result):
        raise InternalError(f"stage {key.stage!r} returned a path in its temporary folder", folder)
    record = json.loads(text)
    content = {**record, "record_sha256": json_digest(record)}
    write_durably(folder / RECORD, json.dumps(content, indent=1, ensure_ascii=False).encode())
    return record


def read_record(folder: Path, key_id: str | None = None, *, verify: bool = False) -> dict[str, Any] | None:
    """The record of an entry, or `None` where the entry is not what was written.

    Checked are the record's own digest, its key, and every file's size and time; a file whose time changed is read
    and compared, and with `verify` every file is.
    """
    try:
        record = json.loads((folder / RECORD).read_bytes())
        claimed = record.pop("record_sha256")
        if claimed != json_digest(record):
            return None
        key = StageKey(**record["key"])
        if folder.name != key.id or key_id not in (None, key.id):
            return None
        for name, expected in record["files"].items():
            path = folder / name
            state = path.lstat()
            if not stat.S_ISREG(state.st_mode) or state.st_size != expected["bytes"]:
                return None
            if (verify or state.st_mtime_ns != expected["mtime_ns"]) and file_digest(path) != expected["sha256"]:
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record
