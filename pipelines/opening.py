"""Opening a variant from plain data, as jobs and timing workers do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exporter.artifact import Artifact, Variant

if TYPE_CHECKING:
    from exporter.targets.base import Session

OPENER = "pipelines.opening:open_variant"


def opening(variant: Variant, artifact: Artifact, trusted_digests: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The JSON arguments with which `open_variant` opens a variant in another process."""
    return {
        "variant": {"target": variant.target, "precision": variant.precision, "form": variant.form},
        "artifact": artifact.to_dict(),
        "trusted_digests": sorted(trusted_digests),
    }


def open_variant(arguments: dict[str, Any], *, threads: int) -> Session:
    """Open what `opening` describes, with so many compute threads.

    Raises:
        RequestError: The artifact cannot be opened, or is an engine that is not trusted or does not fit.
    """
    from exporter.targets import get_target

    variant = Variant(**arguments["variant"])
    artifact = Artifact.from_dict(arguments["artifact"])
    trusted = frozenset(arguments.get("trusted_digests", ()))
    return get_target(variant.target).open(artifact, variant, threads=threads, trusted_digests=trusted)
