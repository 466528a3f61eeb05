from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def bert_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT as PyTorch's own exporter leaves it, metadata, shape arithmetic, index grids and guards included."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=101,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    bert = BertModel(config, add_pooling_layer=False).eval()
    for parameter in bert.parameters():
        # Freshly initialised biases are all zero, and equal weights would be stored once.
        torch.nn.init.normal_(parameter, std=0.2)

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = bert

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    ids = torch.randint(1, 100, (2, 9))
    batch, sequence = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("sequence", min=1, max=64)
    program = torch.onnx.export(
        Wrapped(),
        (ids, torch.ones_like(ids)),
        dynamo=True,
        dynamic_shapes=({0: batch, 1: sequence},) * 2,
        opset_version=20,
        output_names=["last_hidden_state"],
        verbose=False,
    )
    assert program is not None
    path = tmp_path_factory.mktemp("bert") / "raw.onnx"
    program.save(path)
    return path


def text_samples(*, nothing: bool = False) -> list[dict[str, np.ndarray]]:
    """Ragged batches of several shapes, padded right and left; with `nothing`, the last row attends to no token."""
    random = np.random.default_rng(11)
    samples = []
    for batch, length in ((1, 1), (1, 16), (3, 7), (4, 33)):
        mask = np.ones((batch, length), np.int64)
        for row in range(1, batch):
            kept = int(random.integers(1, length + 1))
            mask[row, kept:] = 0
            if row % 2:
                mask[row] = mask[row, ::-1]
        if nothing:
            mask[-1] = 0
        samples.append({"input_ids": random.integers(1, 100, (batch, length)), "attention_mask": mask})
    return samples
