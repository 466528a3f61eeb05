"""What `planish engine` prints."""

from __future__ import annotations

import os
from pathlib import Path

from exporter.errors import RequestError
from pipelines.cli.screens import Screen, emit
from pipelines.progress import Progress


def build_engines(bundle: Path, out: Path | None, gpus: list[str], check: bool, as_json: bool, quiet: bool) -> int:
    """Build a bundle's files for GPUs that need not be there; 1 where one is refused, 4 where the builder crashed."""
    from pipelines.preflight import GPUS, preflight

    if check and out is not None:
        raise RequestError("with --check nothing is kept", f"--out {out}", "Leave one of them out")
    if not check and out is None:
        place = Path(os.path.abspath(bundle))
        out = place.parent / f"{place.name}-tensorrt"
    progress = Progress(quiet=quiet)
    with progress.step("Build engines"):
        found = preflight(bundle, gpus or GPUS, out=out, on_progress=progress.update)
    status = 4 if any(one.crashed for one in found) else 0 if all(one.ok for one in found) else 1
    if as_json:
        emit({"bundle": str(bundle), "ok": status == 0, "engines": [one.to_dict() for one in found]})
        return status
    screen = Screen()
    rows = [
        (
            one.variant,
            one.gpu,
            "builds" if one.ok else "crashed" if one.crashed else "refused",
            f"{one.bytes / 1e6:.1f} MB" if one.bytes is not None else "",
            f"{one.seconds:.1f} s" if one.seconds is not None else "",
            str(sum(one.layers.values())) if one.ok else "",
            ", ".join(f"{count} {kind}" for kind, count in one.products.items()),
        )
        for one in found
    ]
    screen.table(("Variant", "GPU", "", "Engine", "Build", "Layers", "Products by type"), rows, right=(3, 4, 5))
    told = set()
    for one in found:
        if not one.ok and one.reason not in told:  # each GPU's parser says the same
            told.add(one.reason)
            screen.line(f"{one.file}: {one.reason}. {one.remedy}", "failed")
    screen.show()
    bad = ", ".join(sorted({one.file for one in found if not one.ok}))
    print(f"{bundle}: " + {0: "NVIDIA's builder takes every file", 1: f"refused: {bad}"}.get(status, f"crashed: {bad}"))
    if any(one.engine for one in found):
        print(f"Engines: {out}")
    return status
