"""``planish certify``: what a compressed checkpoint really is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.errors import RequestError
from pipelines.cli.screens import Screen, emit
from pipelines.compress.wording import percentage
from pipelines.progress import Progress
from pipelines.report.formats import count, large_count, ratio, size

_FORMS = {"found": "as it is", "smaller": "without its dead parts"}


def certify_checkpoint(checkpoint: str, out: Path | None, as_json: bool, quiet: bool, **options: Any) -> int:
    """Look, print, and return the exit status: 1 where a claim is not true."""
    from pipelines.compress.certify import certify

    for name in ("points", "targets"):
        options[name] = _parts(options[name], name)
    record = certify(checkpoint, out=out, progress=Progress(quiet=quiet), **options)
    if as_json:
        emit(record)
    else:
        show_certificate(record)
    return 0 if all(claim["true"] for claim in record["claims"]) else 1


def _parts(text: str | None, name: str) -> list[str] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise RequestError(f"--{name} names nothing", repr(text), "Leave it out, or separate names by commas")
    return parts


def show_certificate(record: Mapping[str, Any]) -> None:
    """The sentences, then the tables that they rest on."""
    screen, weights = Screen(), record["weights"]
    screen.heading(f"{record['checkpoint']} ({record['model_type']}, {record['task']})")
    dtypes = ", ".join(f"{name} {large_count(number)}" for name, number in weights["dtypes"].items())
    screen.pairs(
        [
            (
                "Parameters",
                f"{large_count(weights['parameters'])}, of which {large_count(weights['nonzero'])} not zero",
            ),
            ("On disk", size(weights["bytes"]) + (f" ({dtypes})" if dtypes else "")),
        ]
    )
    screen.heading("What it is")
    for sentence in record["findings"]:
        screen.line(f"- {sentence}")
    for claim in record["claims"]:
        screen.line(f"Claim {claim['sentence']}", "passed" if claim["true"] else "failed")
    _show_matrices(record, screen)
    if record["latency"] is not None and record["latency"]["ratios"]:
        _show_speed(record["latency"], screen)
    screen.show()


def _show_matrices(record: Mapping[str, Any], screen: Screen) -> None:
    screen.heading("Weight matrices (2:4: share of the groups of four that have two zeros)")
    rows = [
        (
            entry["name"],
            "x".join(map(str, entry["shape"])),
            percentage(entry["sparsity"]),
            "exact" if entry["exactly_two_four"] else _share(entry["two_four_share"]),
            f"{entry['rank']} of {min(entry['shape'][0], entry['elements'] // entry['shape'][0])}",
            "many" if entry["values"] is None else count(entry["values"]),
        )
        for entry in record["sparsity"]["matrices"]
    ]
    screen.table(("Matrix", "Shape", "Zeros", "2:4", "Rank", "Values"), rows, right=(2, 3, 4, 5))


def _share(value: float | None) -> str:
    return "" if value is None else percentage(value)


def _show_speed(latency: Mapping[str, Any], screen: Screen) -> None:
    points = latency["points"]
    screen.heading("How many times faster than its dense twin, with 95 % intervals")
    rows = []
    for name, forms in latency["ratios"].items():
        for form, found in forms.items():
            if "error" in found:
                screen.line(f"not timed: {name}, {_FORMS[form]}: {found['error']}")
                continue
            cells = [found["points"][label] for label in points]
            rows.append((name, _FORMS[form], *(_cell(cell) for cell in (found, *cells))))
    screen.table(("Target", "Checkpoint", "Overall", *points), rows, right=range(2, 3 + len(points)))
    screen.line(
        "The dense twin has the same shapes, with random numbers for the zeros. One race, paired by its rounds.",
        "dim",
    )
    if latency["skipped"]:
        names = ", ".join(latency["skipped"])
        screen.line(f"not here: {names} (planish doctor says why, and --json has it)", "dim")
    for note in latency["notes"]:
        screen.line(note, "dim")


def _cell(found: Mapping[str, Any] | None) -> str:
    return "" if found is None else f"{ratio(found['value'])} [{found['low']:.2f}, {found['high']:.2f}]"
