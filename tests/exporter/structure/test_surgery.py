from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from exporter.errors import RequestError
from exporter.structure import (
    STRUCTURE,
    apply_structure,
    keep_layers,
    layer_parts,
    layers_of,
    remove_heads,
    remove_neurons,
    share_layers,
    structure_of,
    supported_types,
)
from exporter.structure.anatomy import linear_weights
from tests.exporter.structure.planted import Folders, assert_alike, opened, outputs, silence_head, silence_neurons

WITH_HEADS = ("bert", "bert-dense", "bert-classifier", "bert-mlm", "distilbert", "vit")


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("kind", WITH_HEADS)
def test_a_head_that_nothing_reads_can_go(model_folder: Folders, kind: str) -> None:
    original = opened(model_folder(kind))
    silence_head(original.module, layer=1, head=2)
    before, size = outputs(original), parameters(original.module)
    remove_heads(original.module, 1, [2])
    assert_alike(outputs(original), before)
    parts = layer_parts(original.module, 1)
    assert parts.heads == 3
    for part in (parts.query, parts.key, parts.value):
        assert part.weight.shape == (24, 32)
        assert part.bias.shape == (24,)
    assert parts.output.weight.shape == (32, 24)
    assert parts.output.bias.shape == (32,)
    assert size - parameters(original.module) == 3 * 8 * 33 + 32 * 8
    assert layer_parts(original.module, 0).heads == 4


def test_removing_a_head_that_is_read_changes_the_outputs(model_folder: Folders) -> None:
    """Else the tests above would prove nothing."""
    original = opened(model_folder("bert"))
    before = outputs(original)
    remove_heads(original.module, 1, [2])
    assert np.abs(outputs(original)["last_hidden_state"] - before["last_hidden_state"]).max() > 1e-4


@pytest.mark.parametrize("kind", [*WITH_HEADS, "mpnet"])
def test_neurons_that_nothing_reads_can_go(model_folder: Folders, kind: str) -> None:
    original = opened(model_folder(kind))
    silence_neurons(original.module, 0, [0, 5, 63])
    before = outputs(original)
    remove_neurons(original.module, 0, [63, 0, 5])
    assert_alike(outputs(original), before)
    parts = layer_parts(original.module, 0)
    assert (parts.up.weight.shape, parts.up.bias.shape, parts.down.weight.shape) == ((61, 32), (61,), (32, 61))
    assert structure_of(original.module)["neurons"] == [61, 64]


def test_heads_are_counted_as_the_layer_has_them_now(model_folder: Folders) -> None:
    original = opened(model_folder("bert"))
    rows = layer_parts(original.module, 0).query.weight.detach().reshape(4, 8, 32)[[1, 3]].clone()
    remove_heads(original.module, 0, [0])
    remove_heads(original.module, 0, [1])
    assert torch.equal(layer_parts(original.module, 0).query.weight.reshape(2, 8, 32), rows)


def test_layers_are_kept_in_their_order(model_folder: Folders, tmp_path: Path) -> None:
    original = opened(model_folder("bert-classifier"))
    second = layers_of(original.module)[1]
    keep_layers(original.module, [1])
    assert list(layers_of(original.module)) == [second]
    assert original.module.config.num_hidden_layers == 1
    assert not hasattr(original.module.config, STRUCTURE)
    assert np.isfinite(outputs(original)["logits"]).all()


def test_shared_layers_are_one(model_folder: Folders) -> None:
    original = opened(model_folder("distilbert"))
    size = parameters(original.module)
    share_layers(original.module, [[0, 1]])
    assert structure_of(original.module)["shares"] == [0, 0]
    assert parameters(original.module) < size - 32 * 64
    assert len(list(linear_weights(original.module))) == 6


def test_what_the_configuration_can_say_it_says(model_folder: Folders) -> None:
    module = opened(model_folder("bert")).module
    remove_neurons(module, 0, [1])
    assert getattr(module.config, STRUCTURE) == {"heads": [4, 4], "neurons": [63, 64], "shares": [0, 1]}
    assert module.config.intermediate_size == 64
    remove_neurons(module, 1, [7])
    assert module.config.intermediate_size == 63
    assert not hasattr(module.config, STRUCTURE)
    remove_heads(module, 0, [0])
    remove_heads(module, 1, [0])  # 3 heads of 8 are not 32: a configuration's fields cannot say that
    assert getattr(module.config, STRUCTURE)["heads"] == [3, 3]
    assert module.config.num_attention_heads == 4


@pytest.mark.parametrize("kind", ["deberta-v2", "modernbert", "albert"])
def test_an_unknown_inside_is_refused_with_what_is_known(model_folder: Folders, kind: str) -> None:
    module = opened(model_folder(kind)).module
    with pytest.raises(RequestError) as caught:
        remove_heads(module, 0, [0])
    assert kind in str(caught.value)
    assert type(module).__name__ in str(caught.value)
    assert all(name in str(caught.value) for name in supported_types())


def test_a_part_that_is_replaced_is_named(model_folder: Folders) -> None:
    module = opened(model_folder("bert")).module
    module.encoder.layer[1].output.dense = torch.nn.Identity()
    with pytest.raises(RequestError, match=r"encoder\.layer\.1\.output\.dense"):
        remove_neurons(module, 0, [0])


def test_bad_requests_change_nothing(model_folder: Folders) -> None:
    original = opened(model_folder("bert"))
    before, module = outputs(original), original.module
    for wrong in (
        lambda: remove_heads(module, 0, [0, 1, 2, 3]),
        lambda: remove_heads(module, 0, [4]),
        lambda: remove_heads(module, 2, [0]),
        lambda: remove_neurons(module, 0, range(64)),
        lambda: remove_neurons(module, 0, [-1]),
        lambda: remove_neurons(module, -1, [0]),
        lambda: keep_layers(module, []),
        lambda: keep_layers(module, [0, 2]),
        lambda: keep_layers(module, [1, 0]),
        lambda: share_layers(module, [[0, 2]]),
        lambda: share_layers(module, [[0, 1], [1]]),
        lambda: share_layers(module, [[]]),
    ):
        with pytest.raises(RequestError):
            wrong()
    assert_alike(outputs(original), before, 0.0)
    assert structure_of(module) == {"heads": [4, 4], "neurons": [64, 64], "shares": [0, 1]}


def test_layers_that_differ_cannot_share(model_folder: Folders) -> None:
    module = opened(model_folder("bert")).module
    remove_neurons(module, 0, [0])
    with pytest.raises(RequestError, match="0 and 1"):
        share_layers(module, [[0, 1]])


def test_heads_of_a_model_whose_layers_share_positions_stay(model_folder: Folders) -> None:
    module = opened(model_folder("mpnet")).module
    with pytest.raises(RequestError, match="relative position bias"):
        remove_heads(module, 0, [0])


@pytest.mark.parametrize(
    "wrong",
    [
        {"heads": [4], "neurons": [64, 64], "shares": [0, 1]},
        {"heads": [4, 0], "neurons": [64, 64], "shares": [0, 1]},
        {"heads": [4, 4], "neurons": [64, True], "shares": [0, 1]},
        {"heads": [4, 4], "neurons": [64, 64], "shares": [1, 0]},
        {"heads": [4, 4], "neurons": [64, 64], "shares": [0, 2]},
        {"heads": [4, 3], "neurons": [64, 64], "shares": [0, 0]},
        {"heads": [4, 4], "neurons": "6464", "shares": [0, 1]},
        {"heads": [4, 4], "shares": [0, 1]},
        {"heads": [4, 4], "neurons": [64, 10**12], "shares": [0, 1]},
        {"heads": [5, 4], "neurons": [64, 64], "shares": [0, 1]},
    ],
)
def test_a_structure_that_does_not_fit_is_refused(model_folder: Folders, wrong: dict[str, list[int]]) -> None:
    module = opened(model_folder("bert")).module
    with pytest.raises(RequestError, match=STRUCTURE):
        apply_structure(module, wrong)


def test_a_structure_cannot_remove_heads_where_they_must_stay(model_folder: Folders) -> None:
    module = opened(model_folder("mpnet")).module
    with pytest.raises(RequestError, match="relative position bias"):
        apply_structure(module, {"heads": [3, 4], "neurons": [64, 64], "shares": [0, 1]})
