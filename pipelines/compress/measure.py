"""What a model costs: parameters, bytes, operations per token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TOKENS = 128
"""Length at which operations are counted: attention's share grows with it."""


def measure_model(model: Any, weights: Path | None = None) -> dict[str, Any]:
    """Size and cost of a `transformers` model.

    Args:
        model: In evaluation mode, on the CPU.
        weights: Its file, for the bytes that it takes.

    Returns:
        ``parameters`` (shared ones once), ``non_zero``, ``embedding_parameters``, ``layers``, ``flops_per_token`` (two
        for each multiplication and addition, as PyTorch's own counter has it, at one text of `TOKENS` tokens, or as
        many as the model takes; for a picture the operations of all of it), ``bytes`` and ``layer_structure``: heads
        and neurons by layer, where the inside is known.
    """
    from exporter.errors import RequestError
    from exporter.structure import input_embedding, structure_of

    parameters = list(model.parameters())
    embedding = input_embedding(model)
    embedded = embedding.weight.numel() if isinstance(getattr(embedding, "weight", None), torch.Tensor) else 0
    try:
        structure = structure_of(model)
    except RequestError:  # an inside that is not known is no reason not to count
        structure = None
    flops, tokens = count_flops(model)
    return {
        "parameters": sum(p.numel() for p in parameters),
        "non_zero": sum(int(torch.count_nonzero(p)) for p in parameters),
        "embedding_parameters": embedded,
        "layers": None if structure is None else len(structure["heads"]),
        "flops_per_token": None if flops is None else flops / tokens,
        "bytes": None if weights is None else weights.stat().st_size,
        "layer_structure": structure,
    }


def count_flops(model: Any) -> tuple[float | None, int]:
    """Operations of one forward pass and the number of its tokens (1 for a picture); ``None`` where it does not run."""
    from torch.utils.flop_counter import FlopCounterMode

    from exporter.structure import input_embedding

    config = model.config
    counter = FlopCounterMode(display=False)
    implementation = getattr(config, "_attn_implementation", None)
    if model.main_input_name == "pixel_values":
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        inputs, tokens = {"pixel_values": torch.zeros(1, config.num_channels, size, size)}, 1
    else:
        limit = getattr(config, "max_position_embeddings", None)
        tokens = min(TOKENS, limit - 2 if isinstance(limit, int) and limit > 2 else TOKENS)
        vocabulary = getattr(input_embedding(model), "num_embeddings", None) or getattr(config, "vocab_size", None)
        ids = torch.full((1, tokens), min(5, (vocabulary or 6) - 1))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    try:
        if implementation == "sdpa":  # of its kernel on the CPU the counter knows nothing
            model.set_attn_implementation("eager")
        with torch.no_grad(), counter:
            model(**inputs)
    finally:
        if implementation == "sdpa":
            model.set_attn_implementation("sdpa")
    return float(counter.get_total_flops()), tokens
