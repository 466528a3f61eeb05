"""Opened tiny models with parts that do nothing, and the ways to read a written one again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from exporter.original import Original, open_original
from exporter.sources import resolve_source
from exporter.structure import layer_parts, save_checkpoint
from exporter.structure.checkpoint import files_beside
from exporter.tasks import get_task, infer_task

Folders = Callable[..., Path]


def opened(folder: Path, task: str | None = None) -> Original:
    source = resolve_source(str(folder))
    return open_original(source, get_task(task) if task else infer_task(source))


def saved(original: Original, folder: Path, **options: object) -> Path:
    """The original as it is now, written with all that lies beside its weights."""
    save_checkpoint(original.module, folder, small_files=files_beside(original.source), **options)  # type: ignore[arg-type]
    return folder


def outputs(original: Original) -> dict[str, np.ndarray]:
    return original.run({name: tensor.numpy() for name, tensor in original.example.items()})


def assert_alike(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], rounding: float = 2e-6) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=rounding, atol=rounding, err_msg=name)


def silence_head(module: object, layer: int, head: int) -> None:
    """Let nothing of a head's result through the output projection."""
    parts = layer_parts(module, layer)
    with torch.no_grad():
        parts.output.weight[:, head * parts.head_size : (head + 1) * parts.head_size] = 0.0


def silence_neurons(module: object, layer: int, neurons: list[int]) -> None:
    parts = layer_parts(module, layer)
    with torch.no_grad():
        parts.down.weight[:, neurons] = 0.0
