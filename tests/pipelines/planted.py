"""A model whose attention scores leave the range of FP16, while its inputs and outputs fit easily."""

from __future__ import annotations

import torch

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
