"""Opening a variant from plain data, as worker processes and jobs do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifact import Artifact, Variant

if TYPE_CHECKING:
    from exporter.targets.base import Session

OPENER = "pipelines.opening:open_variant"


def opening(variant: Variant, artifact: Artifact, *, threads: int, trusted_digests: frozenset[str]) -> dict[str, Any]:
    """The JSON arguments with which `open_variant` opens a variant in another process."""
    return {
        "target": variant.target,
        "precision": variant.precision,
        "form": variant.form,
        "artifact": artifact.to_dict(),
        "threads": threads,
        "trusted_digests": sorted(trusted_digests),
    }


def open_variant(arguments: dict[str, Any]) -> Session:
    """Open what `opening` describes.

    Raises:
        RequestError: The artifact cannot be opened, or is an engine that is not trusted or does not fit.
    """
    from exporter.targets import get_target

    variant = Variant(arguments["target"], arguments["precision"], arguments["form"])
    return get_target(variant.target).open(
        Artifact.from_dict(arguments["artifact"]),
        variant,
        threads=int(arguments["threads"]),
        trusted_digests=frozenset(arguments["trusted_digests"]),
    )


def artifact_file(arguments: dict[str, Any]) -> Path:
    """The file that `open_variant` will open."""
    return Path(arguments["artifact"]["path"])
