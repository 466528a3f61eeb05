"""Inputs and outputs as safetensors files: named sets of arrays."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]
_BETWEEN = "|"


def write_sets(path: Path, sets: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Write named sets of arrays to one safetensors file, in the order given; bytes depend on nothing else.

    Arrays of dtype bool and bfloat16 included: safetensors holds what NumPy and ml_dtypes name.
    """
    from safetensors.numpy import save_file

    flat = {
        f"{name}{_BETWEEN}{key}": np.ascontiguousarray(a) for name, arrays in sets.items() for key, a in arrays.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(flat, path, metadata={"sets": json.dumps(list(sets))})


def read_sets(path: Path) -> Iterator[tuple[str, Arrays]]:
    """The sets of a file, one at a time, in the order in which they were written."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        members: dict[str, list[str]] = {}
        for key in file.keys():  # noqa: SIM118 - not a mapping
            members.setdefault(key.split(_BETWEEN, 1)[0], []).append(key)
        for name in json.loads((file.metadata() or {}).get("sets", "[]")) or sorted(members):
            yield name, {key.split(_BETWEEN, 1)[1]: file.get_tensor(key) for key in members.get(name, [])}


def read_samples(path: Path) -> list[Arrays]:
    """The sets of a file without their names."""
    return [arrays for _, arrays in read_sets(path)]
