"""Which packages are installed, asked of their metadata: nothing is imported, so asking costs little."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def installed_version(*distributions: str) -> str | None:
    """The version of the first of `distributions` that is installed, or ``None``."""
    for distribution in distributions:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None
