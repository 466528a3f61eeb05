from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exporter.errors import RequestError
from pipelines.compress.embedding_cut import cut_rows, needed_ids, token_embedding

Folders = Callable[..., Path]
SIZE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 16,
    "embedding_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
MAPPING = {0: 0, 1: 1, 2: 2, 3: 3, 7: 4, 50: 5, 99: 6}
IDS = torch.tensor([[2, 50, 7, 3], [2, 99, 3, 0]])
NEW_IDS = torch.tensor([[MAPPING[int(number)] for number in row] for row in IDS])


def make(kind: str, **changes: Any) -> Any:
    import transformers

    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**(SIZE | changes))).eval()
    with torch.no_grad():  # biases begin as zeros
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def outputs(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's first output, and the hidden states that it is made of."""
    with torch.inference_mode():
        found = model(input_ids=ids, output_hidden_states=True)
        return found[0], found.hidden_states[-1]


def assert_same(model: Any, ids: torch.Tensor, logits: torch.Tensor, hidden: torch.Tensor) -> None:
    """To the bit up to the head; a product with fewer columns may sum in another order."""
    found = outputs(model, ids)
    assert torch.equal(found[1], hidden)
    torch.testing.assert_close(found[0], logits, rtol=1e-6, atol=1e-6)


LANGUAGE_MODELS = [
    "BertForMaskedLM",
    "BertForPreTraining",
    "AlbertForMaskedLM",
    "DistilBertForMaskedLM",
    "ElectraForMaskedLM",
    "ModernBertForMaskedLM",
    "DebertaV2ForMaskedLM",
    "BertLMHeadModel",
]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_logits_of_kept_tokens_are_the_same(kind: str, tied: bool) -> None:
    changes = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    model = make(kind, tie_word_embeddings=tied, **changes)
    logits, hidden = outputs(model, IDS)
    assert token_embedding(model, 100).weight.shape == (100, 16)
    assert cut_rows(model, MAPPING) == {}
    assert_same(model, NEW_IDS, logits[..., list(MAPPING)], hidden)
    head = model.get_output_embeddings()
    assert (head.weight is model.get_input_embeddings().weight) == tied
    assert (head.out_features, model.config.vocab_size) == (7, 7)
    fresh = type(model)(model.config)  # what loading the folder makes
    assert {n: t.shape for n, t in fresh.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_head_without_a_table_of_its_own() -> None:
    """DeBERTa's newer head multiplies by the embedding that it is given, and has a bias per token."""
    model = make("DebertaV2ForMaskedLM", legacy=False)
    logits, hidden = outputs(model, IDS)
    token_embedding(model, 100)
    cut_rows(model, MAPPING)
    assert_same(model, NEW_IDS, logits[..., list(MAPPING)], hidden)
    assert model.get_output_embeddings().out_features == 16


def test_a_head_with_unknown_tables_is_refused() -> None:
    model = make("BertForMaskedLM")
    model.other = torch.nn.Linear(16, 100)
    with pytest.raises(RequestError, match=r"not known whether they hold tokens.*other\.weight"):
        token_embedding(model, 100)


def test_encoder_decoders_are_refused() -> None:
    import transformers

    config = transformers.T5Config(vocab_size=100, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(RequestError, match="encoder and decoder"):
        token_embedding(transformers.T5Model(config), 100)


def test_ids_in_the_configuration_follow() -> None:
    model = make("BertModel", pad_token_id=50, eos_token_id=[7, 99], bos_token_id=99)
    assert model.get_input_embeddings().padding_idx == 50
    assert needed_ids(model, dict.fromkeys(range(100), "")) == {7, 50, 99}
    model.config.sep_token_id = 400  # of a larger model's configuration
    assert cut_rows(model, MAPPING) == {"sep_token_id": [400]}
    assert model.get_input_embeddings().padding_idx == model.config.pad_token_id == 5
    assert (model.config.eos_token_id, model.config.bos_token_id, model.config.sep_token_id) == ([4, 6], 6, None)


@pytest.mark.parametrize("kind", ["RobertaModel", "XLMRobertaModel", "CamembertModel", "MPNetModel"])
def test_tokens_up_to_the_padding_stay_where_positions_count_from_it(kind: str) -> None:
    padding = 1 if kind == "MPNetModel" else 6  # the first has it in its code
    model = make(kind, pad_token_id=padding, bos_token_id=0, eos_token_id=2)
    needed = needed_ids(model, dict.fromkeys(range(100), ""))
    assert needed == {0, 2, *range(padding + 1)}
    mapping = {number: new for new, number in enumerate(sorted({*needed, 30, 99}))}
    ids = torch.tensor([[0, 30, 99, 2], [0, 99, padding, padding]])
    expected, _ = outputs(model, ids)
    cut_rows(model, mapping)
    found, _ = outputs(model, torch.tensor([[mapping[int(i)] for i in row] for row in ids]))
    assert torch.equal(found, expected)
    with pytest.raises(RequestError, match="positions from a padding id that no token has"):
        needed_ids(make(kind, pad_token_id=padding), {0: "", 50: ""})


def test_frozen_tables_and_other_types_stay_so() -> None:
    model = make("BertForMaskedLM", pad_token_id=0).to(torch.bfloat16).requires_grad_(False)
    cut_rows(model, MAPPING)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in model.parameters())
