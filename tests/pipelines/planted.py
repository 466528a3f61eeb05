"""Models that lose where others do not: by attention scores beyond FP16, by outliers that coarse steps drown."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WIDTH = 32
LOUDNESS = 100.0


class LoudAttention(torch.nn.Module):
    """Queries and keys of about 100: their products reach some 200,000, and are scaled down before the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        with torch.no_grad():
            for layer, loud in ((self.query, LOUDNESS), (self.key, LOUDNESS), (self.value, 1.0)):
                torch.nn.init.normal_(layer.weight, std=loud / WIDTH**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        weights = torch.softmax(scores * (1.0 / (LOUDNESS**2 * WIDTH)), dim=-1)
        return weights @ self.value(x)


def loud_attention() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The model, with weights of its own seed, and an input of (batch, sequence, 32)."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return LoudAttention().eval(), {"x": torch.randn(2, 12, WIDTH)}


def plant_outliers(
    folder: Path, made: Path, layers: tuple[int, ...], channels: int, factor: float, scale: float = 20
) -> Path:
    """A BERT whose attention hands on some channels `factor` times as large, which are read as much smaller: in a range
    with them the others are lost. With `scale` 1 it computes the same; a random one needs its attention louder.
    """
    shutil.copytree(folder, made)
    weights = load_file(made / "model.safetensors")
    prefix = next(iter(name for name in weights if "encoder.layer.0." in name)).partition("encoder.layer.")[0]
    for layer in layers:
        attention = f"{prefix}encoder.layer.{layer}.attention."
        weights[f"{attention}self.value.weight"] *= scale
        weights[f"{attention}output.dense.weight"] *= scale
        weights[f"{attention}self.value.weight"][:channels] *= factor
        weights[f"{attention}self.value.bias"][:channels] *= factor
        weights[f"{attention}output.dense.weight"][:, :channels] /= factor
    save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
    return made
