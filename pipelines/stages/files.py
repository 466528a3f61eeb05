"""What the record stage leaves for later stages: parity cases, inputs of operating points, predictions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.verification.envelope import Case
from pipelines.verification.judgement import Floor
from pipelines.verification.predict import Span

Arrays = dict[str, np.ndarray]
CASES = "cases.json"
FLOORS = "floors.json"
PREDICTIONS = "predictions"
GOLDEN = "golden"
GOLDEN_ROWS = 512
"""Rows of text that a bundle carries at most, with the original's predictions on them."""
GOLDEN_TENSORS = 32
"""The same for pictures and tensors, which are carried as inputs."""
ROWS = "rows.jsonl"
BATCHES = "batches.safetensors"
_IN, _OUT = "input|", "output|"


def external_data(arguments: Mapping[str, Any]) -> bool | None:
    """What the recipe says about weights in a file beside the graph, as `exporter.onnx_files.save_model` takes it."""
    return True if arguments["external_data"] == "always" else None


def write_case(folder: Path, number: int, case: Case, outputs: Mapping[str, np.ndarray]) -> str:
    """Write one parity case with the original's outputs; returns the file's name."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    name = f"{number:03d}.safetensors"
    flat = {_IN + key: np.ascontiguousarray(a) for key, a in case.inputs.items()}
    flat |= {_OUT + key: np.ascontiguousarray(a) for key, a in outputs.items()}
    save_file(flat, folder / name)
    return name


def write_cases(folder: Path, entries: Sequence[tuple[Case, str]]) -> None:
    """Write the list of cases: what each is, and the file that holds it."""
    listed = [
        {"name": case.name, "kind": case.kind, "partner": case.partner, "row": case.row, "file": file}
        for case, file in entries
    ]
    (folder / CASES).write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")


def read_cases(folder: Path) -> Iterator[tuple[Case, Arrays]]:
    """The cases with the original's outputs, one at a time."""
    from safetensors.numpy import load_file

    for entry in json.loads((folder / CASES).read_text(encoding="utf-8")):
        arrays = load_file(folder / entry["file"])
        inputs = {key.removeprefix(_IN): a for key, a in arrays.items() if key.startswith(_IN)}
        outputs = {key.removeprefix(_OUT): a for key, a in arrays.items() if key.startswith(_OUT)}
        yield Case(entry["name"], inputs, entry["kind"], entry["partner"], entry["row"]), outputs


def read_partners(folder: Path) -> set[str]:
    """Names of the cases that another case is compared with; reads the list alone, no arrays."""
    listed = json.loads((folder / CASES).read_text(encoding="utf-8"))
    return {entry["partner"] for entry in listed if entry["partner"]}


def read_case_inputs(recorded: Path, most: int) -> list[Arrays]:
    """The inputs of some cases of different kinds, small ones first."""
    cases = [case for case, _ in read_cases(recorded / "cases")]
    cases.sort(key=lambda case: sum(array.size for array in case.inputs.values()))
    kinds: dict[str, Case] = {}
    for case in cases:
        kinds.setdefault(case.kind, case)
    chosen = list(kinds.values())
    chosen += [case for case in cases if case not in chosen]
    return [case.inputs for case in chosen[:most]]


def write_floors(folder: Path, floors: Mapping[str, Floor]) -> None:
    """Write the noise floors by precision."""
    data = {
        name: {"note": f.note, "errors": f.errors, "fixed": f.fixed, "magnitudes": dict(f.magnitudes)}
        for name, f in floors.items()
    }
    (folder / FLOORS).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def read_floors(folder: Path) -> dict[str, Floor]:
    """The noise floors by precision."""
    data = json.loads((folder / FLOORS).read_text(encoding="utf-8"))
    return {
        name: Floor(entry["note"], entry["errors"], entry["fixed"], entry.get("magnitudes", {}))
        for name, entry in data.items()
    }


def write_predictions(folder: Path, predictions: Sequence[Any]) -> None:
    """Write predictions (arrays of any length, or answer spans), one per row of the data."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    if predictions and isinstance(predictions[0], Span):
        spans = [list(span) for span in predictions]
        (folder / "spans.json").write_text(json.dumps(spans) + "\n", encoding="utf-8")
        return
    arrays = [np.asarray(prediction) for prediction in predictions]
    values = np.concatenate([a.ravel() for a in arrays]) if arrays else np.zeros(0)
    lengths = np.array([a.size for a in arrays], dtype=np.int64)
    save_file({"values": np.ascontiguousarray(values), "lengths": lengths}, folder / "arrays.safetensors")


def read_predictions(folder: Path) -> list[Any]:
    """What `write_predictions` wrote."""
    from safetensors.numpy import load_file

    if (folder / "spans.json").is_file():
        return [Span(*span) for span in json.loads((folder / "spans.json").read_text(encoding="utf-8"))]
    stored = load_file(folder / "arrays.safetensors")
    return list(np.split(stored["values"], np.cumsum(stored["lengths"])[:-1])) if len(stored["lengths"]) else []


def write_rows(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of text data, one JSON object a line."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(dict(row), ensure_ascii=False, sort_keys=True) + "\n" for row in rows]
    (folder / ROWS).write_text("".join(lines), encoding="utf-8")


def read_rows(folder: Path) -> list[dict[str, Any]] | None:
    """What `write_rows` wrote; ``None`` where there are batches instead."""
    if not (folder / ROWS).is_file():
        return None
    text = (folder / ROWS).read_text(encoding="utf-8")
    # Not `splitlines`: it also takes U+2028, U+0085 and their like for ends of lines, which JSON leaves inside a text.
    return [json.loads(line) for line in text.split("\n") if line]


def write_batches(folder: Path, batches: Sequence[Mapping[str, np.ndarray]], indices: Sequence[Sequence[int]]) -> None:
    """Write encoded batches, and which rows each holds."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    flat = {f"{i}|{key}": np.ascontiguousarray(a) for i, batch in enumerate(batches) for key, a in batch.items()}
    flat |= {f"{i}|": np.asarray(rows, dtype=np.int64) for i, rows in enumerate(indices)}
    save_file(flat, folder / BATCHES)


def read_batches(folder: Path) -> list[tuple[list[int], Arrays]]:
    """What `write_batches` wrote: rows and inputs of each batch."""
    from safetensors.numpy import load_file

    found: dict[int, Arrays] = {}
    for name, array in load_file(folder / BATCHES).items():
        number, key = name.split("|", 1)
        found.setdefault(int(number), {})[key] = array
    return [(found[i].pop("").tolist(), found[i]) for i in sorted(found)]
