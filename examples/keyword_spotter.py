"""A module of your own as a source: a small convolutional classifier over audio features.

`planish run examples/classifier.yaml`, from the repository's root, calls `keyword_spotter`. The weights are random
(Planish seeds torch while it calls a factory); where yours are trained, load them here with
``safetensors.torch.load_file`` and ``load_state_dict``.
"""

from __future__ import annotations

import torch
from torch import nn

BANDS = 40
CLASSES = 12


class KeywordSpotter(nn.Module):
    """Which of `CLASSES` keywords a clip holds.

    Input: float32 (batch, `BANDS`, frames), log-mel energies. Output: float32 (batch, `CLASSES`), logits.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(BANDS, width, kernel_size=5, padding=2),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Conv1d(width, width, kernel_size=5, padding=2),
            nn.BatchNorm1d(width),
            nn.ReLU(),
        )
        self.head = nn.Linear(width, CLASSES)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(features).mean(dim=-1))


def keyword_spotter() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The module and one example of each input, by the names of `forward`'s parameters."""
    return KeywordSpotter(), {"features": torch.randn(2, BANDS, 100)}
