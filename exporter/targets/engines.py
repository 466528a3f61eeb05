"""Engines: what lies beside each of them, and what is asked before any byte of one is loaded.

An engine is native code for particular hardware and software. Its fingerprint says which; whether it is trusted is a
matter of who built it, which no file beside it can say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from exporter.digests import file_digest
from exporter.errors import RequestError

FINGERPRINT = "fingerprint.json"


def write_sheet(engine: Path, fingerprint: Mapping[str, Any]) -> Path:
    """Write what an engine was built for, and its SHA-256, beside it; returns the file."""
    sheet = engine.parent / FINGERPRINT
    content = {"fingerprint": dict(fingerprint), "sha256": file_digest(engine)}
    sheet.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return sheet


def check_sheet(
    engine: Path,
    trusted_digests: frozenset[str],
    misfits: Callable[[dict[str, Any]], list[str]],
    fields: Mapping[str, type],
) -> None:
    """Refuse an engine that is not whole, does not fit or is not trusted.

    Args:
        engine: The file; `FINGERPRINT` lies beside it.
        trusted_digests: SHA-256 digests of the engines that may run.
        misfits: What keeps an engine of that fingerprint from running here, a phrase each.
        fields: What the fingerprint must have, and of which type.

    Raises:
        RequestError: Says what differs and what would mend it.
    """
    sheet = engine.parent / FINGERPRINT
    again = "Build the engine again, as it was built before: planish run, export or engine"
    for file, what in ((engine, "an engine is missing"), (sheet, "the fingerprint of an engine is missing")):
        if not file.is_file():
            raise RequestError(what, file, again)
    digest = file_digest(engine)
    damaged = RequestError("the fingerprint of an engine is damaged", sheet, again)
    built = _read(sheet, fields)
    if built is None:
        raise damaged
    if built["sha256"] != digest:
        raise RequestError("an engine is not the file that its fingerprint names", engine, again)
    try:
        told = misfits(built["fingerprint"])
    except (ValueError, KeyError, TypeError, AttributeError):  # what somebody wrote into its fields
        raise damaged from None
    if told:
        raise RequestError(
            "an engine was built for another machine", "; ".join(told), "Build one that fits, or run it where it fits"
        )
    if digest not in trusted_digests:
        raise RequestError(
            "an engine is native code, and this one was not built by your own cache",
            engine,
            "Open it with --trust (in Python: trust=True, or its digest) only if you trust where it comes from",
        )


def sheet_of(engine: Path) -> dict[str, Any]:
    """The fingerprint of an engine that `check_sheet` has let pass."""
    found: dict[str, Any] = json.loads((engine.parent / FINGERPRINT).read_text(encoding="utf-8"))["fingerprint"]
    return found


def _read(sheet: Path, fields: Mapping[str, type]) -> dict[str, Any] | None:
    try:
        built = json.loads(sheet.read_text(encoding="utf-8"))
        whole = all(isinstance(built["fingerprint"][name], kind) for name, kind in fields.items())
        if whole and isinstance(built["sha256"], str):
            return dict(built)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None
