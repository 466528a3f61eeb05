"""Checkpoints with something planted, written as other tools would: plain `transformers` folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from exporter.original import open_original
from exporter.sources import resolve_source
from exporter.structure import save_checkpoint
from exporter.structure.anatomy import linear_weights
from exporter.structure.checkpoint import files_beside
from exporter.tasks import infer_task

Change = Callable[[Any], None]


def planted(source: Path | str, folder: Path, change: Change) -> Path:
    """`source` with a change to its module, written to `folder`."""
    found = resolve_source(str(source))
    original = open_original(found, infer_task(found))
    with torch.no_grad():
        change(original.module)
    save_checkpoint(original.module, folder, small_files=files_beside(found))
    return folder


def prune(share: float) -> Change:
    """Zero the smallest weights of each matrix in the layers."""

    def change(module: Any) -> None:
        for _, weight in linear_weights(module):
            order = weight.abs().flatten().argsort()
            weight.view(-1)[order[: round(share * weight.numel())]] = 0.0

    return change


def prune_two_four(module: Any) -> None:
    for _, weight in linear_weights(module):
        groups = weight.view(-1, 4)
        groups.scatter_(1, groups.abs().argsort(dim=1)[:, :2], 0.0)


def lower_rank(rank: int) -> Change:
    def change(module: Any) -> None:
        weight = next(weight for _, weight in linear_weights(module))
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        weight.copy_((left[:, :rank] * values[:rank]) @ right[:rank])

    return change


def cluster(values: int) -> Change:
    def change(module: Any) -> None:
        for _, weight in linear_weights(module):
            book = torch.linspace(-0.1, 0.1, values)
            weight.copy_(book[(weight[..., None] - book).abs().argmin(dim=-1)])

    return change
