"""Cutting the tables of a model that have a row per token: input embedding, and head and bias of a language model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from exporter.errors import RequestError
from exporter.structure import input_embedding
from pipelines.compress.tokenizer_files import new_ids, token_ids

if TYPE_CHECKING:
    from torch import nn


def token_embedding(model: Any, tokens: int) -> nn.Embedding:
    """The model's table of token embeddings, (rows, width): a row for each of `tokens` ids at least.

    Raises:
        RequestError: The model takes no token ids, is an encoder with a decoder, has too few rows, or has tables with a
            row per token whose place is not known.
    """
    from torch import nn

    name = type(model).__name__
    found = input_embedding(model)
    if getattr(model, "main_input_name", "") != "input_ids" or not isinstance(found, nn.Embedding):
        remedy = "Only transformers models whose input is input_ids have a vocabulary to cut"
        raise RequestError("the model takes no token ids", name, remedy)
    if getattr(model.config, "is_encoder_decoder", False):
        remedy = "Encoders and decoders alone can be cut"
        raise RequestError("the vocabulary of a model with encoder and decoder cannot be cut", name, remedy)
    rows = found.weight.shape[0]
    if rows < tokens:
        raise RequestError(
            "the model has fewer embeddings than its tokenizer has tokens",
            f"{rows} rows, {tokens} tokens",
            "Take the tokenizer that the model was trained with",
        )
    if model.get_output_embeddings() is not None:
        _check_head(model, rows)
    return found


def needed_ids(model: Any, tokens: Mapping[int, str]) -> set[int]:
    """Ids that stay for the model's sake: those that its configuration names, and where it counts positions from the
    padding's id on (RoBERTa, MPNet), those up to it, so that it stays the same.

    Raises:
        RequestError: Positions are counted from an id that is no token's.
    """
    found = {
        number
        for config in _configs(model)
        for ids in token_ids(vars(config)).values()
        for number in ids
        if number in tokens
    }
    padding = model.get_input_embeddings().padding_idx
    found |= {padding} & tokens.keys()
    for first in _position_offsets(model):
        upto = {number for number in tokens if number <= first}
        if len(upto) != first + 1:
            remedy = "Take the tokenizer that the model was trained with"
            raise RequestError("the model counts positions from a padding id that no token has", first, remedy)
        found |= upto
    return found


def cut_rows(model: Any, mapping: Mapping[int, int]) -> dict[str, list[int]]:
    """Keep the rows of some tokens, in place: tied tables stay tied, and the configuration agrees.

    Args:
        model: One that `token_embedding` took.
        mapping: New ids from 0 on by the old ones, in the same order.

    Returns:
        The ids in the configuration that no token had, by their keys; these are ``None`` now.
    """
    import torch
    from torch import nn

    first, kept = model.get_input_embeddings().weight, list(mapping)
    rows, head = first.shape[0], model.get_output_embeddings()
    old = {id(tensor): tensor for tensor in _row_tables(model, rows)}
    new: dict[int, nn.Parameter] = {}
    for number, tensor in old.items():
        index = torch.tensor(kept, device=tensor.device)
        new[number] = nn.Parameter(tensor.detach().index_select(0, index), requires_grad=tensor.requires_grad)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) in new:
                setattr(module, name, new[id(parameter)])
        if isinstance(module, nn.Embedding) and module.weight is new[id(first)]:
            module.num_embeddings = len(kept)
            module.padding_idx = None if module.padding_idx is None else mapping.get(module.padding_idx)
        if vars(module).get("vocab_size") == rows:
            module.vocab_size = len(kept)
    if isinstance(head, nn.Linear):
        head.out_features = head.weight.shape[0]
    return _update_configs(model, rows, mapping)


def _update_configs(model: Any, rows: int, mapping: Mapping[int, int]) -> dict[str, list[int]]:
    lost: dict[str, list[int]] = {}
    for config in _configs(model):
        if getattr(config, "vocab_size", None) == rows or config is model.config.get_text_config():
            config.vocab_size = len(mapping)
        for key, ids in token_ids(vars(config)).items():
            setattr(config, key, new_ids(getattr(config, key), mapping))
            if gone := [number for number in ids if number not in mapping]:
                lost[key] = gone
    return lost


def _configs(model: Any) -> Iterator[Any]:
    """The model's configuration, those inside it, and the one for generating text."""
    waiting: list[Any] = [model.config, getattr(model, "generation_config", None)]
    seen: set[int] = set()
    while waiting:
        config = waiting.pop(0)
        if config is not None and id(config) not in seen:
            seen.add(id(config))
            waiting += [value for value in vars(config).values() if hasattr(value, "to_diff_dict")]
            yield config


def _position_offsets(model: Any) -> set[int]:
    """Ids from which on modules count positions: an attribute that only such modules have beside tables."""
    from torch import nn

    attributes = (
        m.padding_idx for m in model.modules() if hasattr(m, "padding_idx") and not isinstance(m, nn.Embedding)
    )
    return {number for number in attributes if isinstance(number, int)}


def _row_tables(model: Any, rows: int) -> Iterator[Any]:
    """Parameters with a row per token: the embedding, and what a language model's head has beside it.

    A head's bias may be kept a second time in the module around it (``cls.predictions.bias``).
    """
    head = model.get_output_embeddings()
    around = [module for module in model.modules() if head is not None and any(c is head for c in module.children())]
    yield model.get_input_embeddings().weight
    for module in (*([] if head is None else [head]), *around):
        yield from (parameter for parameter in module.parameters(recurse=False) if parameter.shape[:1] == (rows,))


def _check_head(model: Any, rows: int) -> None:
    known = {id(tensor) for tensor in _row_tables(model, rows)}
    base = model.base_model_prefix
    named: Sequence[str] = [
        name
        for name, parameter in model.named_parameters()
        if id(parameter) not in known and not name.startswith(f"{base}.") and parameter.shape[:1] == (rows,)
    ]
    if named:
        remedy = "Open the model without its language-modelling head"
        raise RequestError(
            "the model's head has tables of which it is not known whether they hold tokens", named, remedy
        )
