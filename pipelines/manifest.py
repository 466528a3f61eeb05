"""The manifest of a bundle, ``planish.json``: its shape, its digest, its one way of being written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from exporter.artifact import InputContract, Signature, Variant
from exporter.errors import RequestError
from pipelines.digests import json_digest
from pipelines.recipe_sections import BundleName

MANIFEST = "planish.json"
SCHEMA_VERSION = 1
DIGEST_KEY = "manifest_sha256"

Verdict = Literal["passed", "failed", "inconclusive", "skipped"]


class _Closed(BaseModel):
    """Every key is known: a reader can trust that nothing was left out."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _Open(BaseModel):
    """The named keys have this shape; others may stand beside them."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)


class FileEntry(_Closed):
    """One file of the bundle."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class SourceEntry(_Open):
    """Where the model came from: ``kind``, the ``digest`` of weights, configuration and code reference, the licence."""

    kind: str
    digest: str
    licence: str | None = None


class TensorEntry(_Closed):
    """An input or output: NumPy dtype; a dimension is a size or the name of a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class AxisEntry(_Closed):
    """A dynamic axis and the lengths it accepts, both ends included."""

    name: str
    min: int
    max: int


class InputContractEntry(_Closed):
    """What goes in and comes out, and what the caller promises (see `exporter.artifact.InputContract`)."""

    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    axes: tuple[AxisEntry, ...] = ()
    attends: bool = False
    mask: str | None = None
    id_ranges: dict[str, tuple[int, int]] = {}

    @classmethod
    def of(cls, signature: Signature, contract: InputContract) -> InputContractEntry:
        return cls.model_validate({**signature.to_dict(), **contract.to_dict()})

    @property
    def signature(self) -> Signature:
        return Signature.from_dict(self.model_dump(include={"inputs", "outputs", "axes"}))

    @property
    def contract(self) -> InputContract:
        return InputContract(self.attends, self.mask, dict(self.id_ranges))


class GateEntry(_Open):
    """A gate's verdict, why, and the figures behind it (which differ from gate to gate)."""

    verdict: Verdict
    reason: str = ""


class PointEntry(_Open):
    """Latency at one operating point: percentiles in milliseconds, speed-ups as ratios with their 95 % interval."""

    p50_ms: float | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    speedup_vs_best_pytorch: float | None = None


class VariantEntry(_Closed):
    """One candidate and how it fared. The first of `files` is the one that a runtime opens."""

    id: str
    target: str
    precision: str
    form: str | None = None
    files: tuple[str, ...] = ()
    status: Verdict
    reason: str = ""
    gates: dict[str, GateEntry] = {}
    executed: dict[str, Any] | None = None
    points: dict[str, PointEntry] = {}
    peak_rss_bytes: int | None = None
    energy_j: float | None = None
    energy_reason: str = ""

    @field_validator("files")
    @classmethod
    def _inside(cls, files: tuple[str, ...]) -> tuple[str, ...]:
        if unsafe := [name for name in files if not is_safe_name(name)]:
            raise ValueError(f"{unsafe[0]!r} is no path inside the bundle")
        return files

    @model_validator(mode="after")
    def _named_rightly(self) -> VariantEntry:
        if self.id != self.variant.id:
            raise ValueError(f"id {self.id!r} should be {self.variant.id!r}")
        return self

    @property
    def variant(self) -> Variant:
        return Variant(self.target, self.precision, self.form)


class Manifest(_Closed):
    """``planish.json``. `files` and `manifest_sha256` are filled in when the bundle is written.

    Attributes:
        recipe: The resolved recipe (`pipelines.recipe.Recipe.resolved`).
        selected: ``overall`` and each operating point to a variant's id, or `None` where none passed.
        compression: Where the recipe compresses: every model on the way beside the teacher (see
            `pipelines.compress.summary.describe`), and the ``gate`` on what was lost.
        files: Every other file of the bundle by its path, with ``/``.
        manifest_sha256: SHA-256 of the canonical JSON of the manifest without this key.
    """

    schema_version: Literal[1] = 1
    planish_version: str
    name: BundleName
    task: str
    created: str
    source: SourceEntry
    recipe: dict[str, Any]
    input_contract: InputContractEntry
    variants: tuple[VariantEntry, ...]
    selected: dict[str, str | None]
    compression: dict[str, Any] | None = None
    environment: dict[str, Any] = {}
    files: dict[str, FileEntry] = {}
    manifest_sha256: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        ids = [variant.id for variant in self.variants]
        if len(set(ids)) != len(ids):
            raise ValueError("a variant is listed twice")
        selectable = {variant.id for variant in self.variants if variant.status == "passed" and variant.files}
        if wrong := sorted({str(v) for v in self.selected.values() if v is not None and v not in selectable}):
            raise ValueError(f"selected variant {wrong[0]!r} is none that passed and has files")
        return self


def is_safe_name(name: str) -> bool:
    """Whether a name of the manifest is a plain relative path inside the bundle."""
    path = PurePosixPath(name)
    return bool(
        name
        and "\\" not in name
        and "\0" not in name
        and not path.is_absolute()
        and ".." not in path.parts
        and path.as_posix() == name
        and name not in (".", MANIFEST)
    )


def render(data: Mapping[str, Any]) -> bytes:
    """The bytes of ``planish.json``: one text per content, so that any change of a byte shows.

    Raises:
        ValueError: A float is not finite.
    """
    return (json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "surrogatepass")


def manifest_digest(data: Mapping[str, Any]) -> str:
    """The value of `manifest_sha256` for a manifest given as plain data."""
    return json_digest({key: value for key, value in data.items() if key != DIGEST_KEY})


def sealed(manifest: Manifest, files: Mapping[str, FileEntry]) -> Manifest:
    """`manifest` with its list of files and its digest."""
    data = manifest.model_dump(mode="json")
    data["files"] = {name: entry.model_dump() for name, entry in sorted(files.items())}
    data[DIGEST_KEY] = manifest_digest(data)
    return parse_manifest(data, Path(MANIFEST))


def parse_manifest(data: Any, where: Path) -> Manifest:
    """A manifest from plain data.

    Raises:
        RequestError: It is of a newer Planish, or has not the shape of a manifest.
    """
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and not isinstance(version, bool) and version > SCHEMA_VERSION:
        raise RequestError(
            "the bundle was written by a newer Planish", f"{where}, schema_version {version}", "Upgrade Planish"
        )
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the document"
        raise RequestError(
            "the manifest has not the shape of one", f"{where}, {key}: {first['msg']}", "Make the bundle again"
        ) from None
