"""What an opened original offers, whichever kind of source it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.artifact import InputContract, Signature
from exporter.errors import InternalError
from exporter.sources.source import Source
from exporter.tasks.registry import Task

if TYPE_CHECKING:
    from exporter.preprocess import ImageEncoder, TextEncoder

DEFAULT_MAX_BATCH = 1024
"""Largest batch that exports accept when the user names none."""
DEFAULT_MAX_LENGTH = 512
"""Longest sequence that exports accept when neither the source nor the user sets a limit."""
POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
"""Under these names a ``config.json`` tells how many positions a model has."""
NO_LIMIT = 1_000_000
"""A longer `model_max_length` is how tokenizers say that they know none."""


@dataclass
class Original:
    """The opened source.

    Attributes:
        source: Where it came from.
        task: What it does.
        module: An ``nn.Module`` in evaluation mode, FP32, whose ``forward`` takes the signature's inputs by name and
            returns a flat ``dict`` of the signature's outputs; ``None`` for an ONNX source.
        signature: Inputs, outputs and dynamic axes.
        contract: What callers promise about inputs.
        example: Small example inputs as torch tensors (for an ONNX source too), every dynamic axis at least 2 long.
        modality: ``"text"``, ``"image"`` or ``"tensor"``.
        encoder_folder: Where the tokenizer or the image pre-processing lies, if anywhere.
    """

    source: Source
    task: Task
    module: Any
    signature: Signature
    contract: InputContract
    example: dict[str, Any]
    modality: str
    encoder_folder: Path | None = None
    max_length: int | None = field(default=None, repr=False)

    @cached_property
    def encoder(self) -> TextEncoder | ImageEncoder | None:
        """Pre-processing from texts or images to inputs; ``None`` for raw tensors."""
        from exporter.preprocess import load_encoder

        if self.encoder_folder is None:
            return None
        return load_encoder(self.encoder_folder, self.task, self.signature)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Host arrays in, host arrays out, in the module's own precision, without gradients."""
        import torch

        if self.module is None:
            raise InternalError("this original has no PyTorch module", self.source.spec)
        tensors = {
            spec.name: torch.from_numpy(np.ascontiguousarray(inputs[spec.name])) for spec in self.signature.inputs
        }
        with torch.inference_mode():
            outputs = self.module(**tensors)
        return {name: value.numpy() for name, value in outputs.items()}
