"""``planish inspect`` and ``planish doctor``: looking without changing anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pipelines.cli.screens import Screen, emit
from pipelines.report.formats import count, large_count, listing, mapping, percent, shown, size, when

_MANIFEST = "planish.json"
_OPERATOR_COLUMNS = 3


def doctor(as_json: bool) -> int:
    """Print what this machine has and what each missing target needs; returns the exit status."""
    from pipelines.cli.machine import describe_machine, show_machine

    found = describe_machine()
    if as_json:
        emit(found)
    else:
        show_machine(found)
    return 0


def inspect_subject(subject: str, as_json: bool) -> int:
    """Print what is inside a bundle or a model.

    Args:
        subject: A bundle, an ``.onnx`` or ``.pt2`` file, or any other source (as ``package:folder``).
        as_json: Print one JSON document.

    Returns:
        The exit status.

    Raises:
        RequestError: It is nothing of that kind, or it is broken.
    """
    found = describe(subject)
    if as_json:
        emit(found)
    else:
        screen = Screen()
        _SCREENS[found["kind"]](found, screen)
        screen.show()
    return 0


def describe(subject: str) -> dict[str, Any]:
    """What is inside, as plain data; its ``kind`` is ``bundle``, ``onnx``, ``program`` or ``model``."""
    from pipelines.cli import contents

    path = Path(subject).expanduser()
    if path.name == _MANIFEST and path.is_file():
        return contents.describe_bundle(path.parent)
    if (path / _MANIFEST).is_file():
        return contents.describe_bundle(path)
    if path.suffix.lower() == ".onnx":
        return contents.describe_onnx(path)
    if path.suffix.lower() == ".pt2":
        return contents.describe_program(path)
    from exporter.sources import resolve_source

    return contents.describe_source(resolve_source(subject))


def _show_bundle(found: Mapping[str, Any], screen: Screen) -> None:
    source, verdict = found["source"], found["verdict"]
    screen.heading(f"Bundle {found['name']}")
    screen.pairs(
        [
            ("Task", found["task"]),
            ("Source", f"{source.get('spec') or source['kind']} ({source['digest'][:19]})"),
            ("Licence", source.get("licence") or "not declared"),
            ("Made", f"{when(found['created'])}, Planish {found['planish_version']}"),
            ("Size", f"{size(found['bytes'])} in {found['files']} files"),
            ("Verdict", verdict["sentence"]),
        ]
    )
    for problem in found["problems"]:
        screen.line(f"Damaged: {problem}", "failed")
    screen.heading("Variants")
    _show_variants(found, screen)
    _show_compression(found, screen)
    contract = found["input_contract"]
    screen.heading("Input contract")
    _show_values(screen, contract["inputs"], contract["outputs"])
    ranges = contract.get("id_ranges") or {}
    screen.pairs(
        [
            *((f"axis {axis['name']}", f"{axis['min']} to {axis['max']}") for axis in contract["axes"]),
            *((f"values of {name}", f"{low} to {high}") for name, (low, high) in ranges.items()),
            ("promise", f"every row of {contract['mask']} attends to a token" if contract["attends"] else ""),
        ]
    )
    if found["environment"]:
        screen.heading("Environment")
        screen.pairs(_environment(found["environment"]))


def _show_variants(found: Mapping[str, Any], screen: Screen) -> None:
    """The table that ends a run, then each file once with the variants that it belongs to."""
    from pipelines.report.view import ReportView
    from pipelines.table import legend, skipped_lines, variants_table

    view = ReportView({**found, "verdict": {"selected": found["selected"]}})
    if view.tried:
        screen.part(variants_table(view, screen.console))
    for text, style in legend(view):
        screen.line(text, style)
    for variant in view.tried:
        if variant.status != "passed" and variant.reason:
            screen.line(f"{variant.status}  {variant.id}: {variant.reason}", variant.status)
    for text in skipped_lines(view):
        screen.line(f"skipped  {text}", "dim")
    users: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for entry in found["variants"]:
        for file in entry["files"]:
            users.setdefault(file["path"], []).append(entry["id"])
            sizes[file["path"]] = file["bytes"]
    if users:
        screen.heading("Files of the variants")
        rows = [(name, size(sizes[name]), ", ".join(ids)) for name, ids in users.items()]
        screen.table(("File", "Size", "Variants"), rows, right=(1,))


def _show_compression(found: Mapping[str, Any], screen: Screen) -> None:
    """The models on the way, where the recipe compresses."""
    from pipelines.compression_table import compression_lines, models_table
    from pipelines.report.view import ReportView

    view = ReportView({**found, "verdict": {"selected": found["selected"]}}).compression
    if view is not None:
        screen.heading("Compression")
        screen.part(models_table(view, screen.console))
        for text, style in compression_lines(view):
            screen.line(text, style)


def _environment(environment: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for key, value in environment.items():
        if key == "cpu" and isinstance(value, Mapping):
            yield key, str(value.get("model", ""))
        elif key == "gpu" and isinstance(value, Mapping):
            names = ", ".join(str(device.get("name")) for device in listing(value, "devices"))
            yield key, names or "none"
        elif key == "busy_elsewhere":
            if value is not None:
                yield "busy elsewhere", f"{percent(value, 2)} of the processors, while latency was measured"
        elif key.endswith("_bytes"):
            yield key.removesuffix("_bytes").replace("_", " "), size(value) if value is not None else ""
        elif isinstance(value, Mapping):
            yield key, ", ".join(f"{name} {shown(item)}" for name, item in value.items())
        elif value is not None:
            yield key.replace("_", " "), shown(value)


def _show_onnx(found: Mapping[str, Any], screen: Screen) -> None:
    screen.heading(f"ONNX model {found['path']}")
    opsets = ", ".join(f"{domain} {version}" for domain, version in found["opsets"].items())
    weights = [
        f"{dtype}: {large_count(entry['elements'])} in {count(entry['tensors'])} tensors, {size(entry['bytes'])}"
        for dtype, entry in found["weights"].items()
    ]
    data = [f"{file['path']} ({size(file['bytes'])})" for file in found["external_data"]]
    screen.pairs(
        [
            ("File", size(found["bytes"])),
            ("External data", "\n".join(data) or "none"),
            ("Opset", f"{opsets} (IR version {found['ir_version']})"),
            ("Producer", found["producer"]),
            ("Parameters", f"{large_count(found['parameters'])}, {size(found['weight_bytes'])}"),
            ("Weights", "\n".join(weights)),
        ]
    )
    screen.heading("Inputs and outputs")
    _show_values(screen, found["inputs"], found["outputs"])
    if found["axes"]:
        screen.pairs((f"axis {name}", ", ".join(places)) for name, places in found["axes"].items())
    screen.heading(f"Operators: {count(found['nodes'])} nodes of {len(found['operators'])} kinds")
    items = [(name, count(number)) for name, number in found["operators"].items()]
    while len(items) % _OPERATOR_COLUMNS:
        items.append(("", ""))
    rows = [sum(items[at : at + _OPERATOR_COLUMNS], ()) for at in range(0, len(items), _OPERATOR_COLUMNS)]
    screen.table(None, rows, right=range(1, 2 * _OPERATOR_COLUMNS, 2))


def _show_values(screen: Screen, inputs: Iterable[Mapping[str, Any]], outputs: Iterable[Mapping[str, Any]]) -> None:
    rows = [
        (role, value["name"], value["dtype"] or "?", _shape(value["shape"]))
        for role, values in (("input", inputs), ("output", outputs))
        for value in values
    ]
    screen.table(None, rows)


def _shape(shape: Iterable[Any] | None) -> str:
    if shape is None:
        return "any shape"
    return "(" + ", ".join("?" if dim is None else str(dim) for dim in shape) + ")"


def _show_model(found: Mapping[str, Any], screen: Screen) -> None:
    screen.heading(f"Model {found['name']}")
    dtypes = ", ".join(f"{name} {large_count(number)}" for name, number in found["weights_dtypes"].items())
    pickled = " in a pickle checkpoint that holds only tensors" if found["pickled"] else ""
    told = large_count(found["parameters"]) if found["parameters"] is not None else "unknown before it is opened"
    screen.pairs(
        [
            ("Source", f"{found['spec']} ({found['source']})"),
            ("Folder", found["path"]),
            ("Task", found["task"] or found["task_reason"]),
            ("Architecture", ", ".join(found["architectures"]) or found["model_type"]),
            ("Parameters", told),
            ("Weights", f"{size(found['weights_bytes'])}{pickled}" + (f" ({dtypes})" if dtypes else "")),
            ("Licence", found["licence"] or "not declared"),
            ("Digest", found["digest"]),
            *((key.replace("_", " "), shown(value)) for key, value in found["config"].items()),
        ]
    )
    if found["files"]:
        screen.heading("Files")
        screen.table(None, [(file["path"], size(file["bytes"])) for file in found["files"]], right=(1,))


def _show_program(found: Mapping[str, Any], screen: Screen) -> None:
    screen.heading(f"Program {found['path']}")
    screen.pairs([("Contents", found["contents"]), ("Size", size(found["bytes"])), ("Digest", found["digest"])])
    if (sheet := found["fingerprint"]) is not None:
        built = mapping(sheet, "fingerprint")
        screen.pairs([("Built for", built.get("architecture")), ("torch", built.get("torch"))])
    screen.line("It is code: opening it runs what it holds, so Planish opens it only with --trust.")


_SCREENS: dict[str, Callable[[Mapping[str, Any], Screen], None]] = {
    "bundle": _show_bundle,
    "onnx": _show_onnx,
    "program": _show_program,
    "model": _show_model,
}
