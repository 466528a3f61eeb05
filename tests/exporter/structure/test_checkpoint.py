from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from exporter.errors import RequestError
from exporter.structure import (
    STRUCTURE,
    keep_layers,
    layer_parts,
    load_state,
    remove_heads,
    remove_neurons,
    save_checkpoint,
    share_layers,
    structure_of,
)
from exporter.structure.anatomy import linear_weights
from tests.exporter.structure.planted import Folders, assert_alike, opened, outputs, saved, silence_head

KINDS = ("bert", "bert-dense", "bert-classifier", "bert-mlm", "distilbert", "mpnet", "vit")


def config(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def size(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_unchanged_reads_the_same(model_folder: Folders, tmp_path: Path, kind: str) -> None:
    original = opened(model_folder(kind))
    folder = saved(original, tmp_path / "out")
    again = opened(folder)
    assert again.task.name == original.task.name
    assert STRUCTURE not in config(folder)
    assert_alike(outputs(again), outputs(original), 0.0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mpnet"])
def test_removed_heads_and_neurons_read_back(model_folder: Folders, tmp_path: Path, kind: str) -> None:
    original = opened(model_folder(kind))
    silence_head(original.module, 0, 3)
    full = saved(original, tmp_path / "full")
    remove_heads(original.module, 0, [3])
    remove_neurons(original.module, 1, [0, 1])
    folder = saved(original, tmp_path / "out")
    again = opened(folder)
    assert structure_of(again.module) == {"heads": [3, 4], "neurons": [64, 62], "shares": [0, 1]}
    assert config(folder)[STRUCTURE] == structure_of(again.module)
    assert_alike(outputs(again), outputs(original), 0.0)
    assert size(folder) < size(full)


@pytest.mark.parametrize("kind", KINDS)
def test_shared_layers_are_stored_once(model_folder: Folders, tmp_path: Path, kind: str) -> None:
    original = opened(model_folder(kind))
    full = saved(original, tmp_path / "full")
    share_layers(original.module, [[0, 1]])
    folder = saved(original, tmp_path / "out")
    layer = sum(p.numel() for part in _parts(original.module) for p in part.parameters())
    assert size(folder) < size(full)
    tensors = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if tensor.size}
    every = sum(tensor.size for tensor in load_file(full / "model.safetensors").values())
    assert every - sum(tensor.size for tensor in tensors.values()) >= layer
    assert not any("layer.1." in name or "layers.1." in name for name in tensors)
    again = opened(folder)
    assert structure_of(again.module)["shares"] == [0, 0]
    assert_alike(outputs(again), outputs(original), 0.0)


def _parts(module: object) -> list[torch.nn.Module]:
    parts = layer_parts(module, 1)
    return [parts.query, parts.key, parts.value, parts.output, parts.up, parts.down]


def test_kept_layers_need_no_word_of_their_own(model_folder: Folders, tmp_path: Path) -> None:
    import transformers

    original = opened(model_folder("bert-classifier"))
    keep_layers(original.module, [1])
    folder = saved(original, tmp_path / "out")
    assert STRUCTURE not in config(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        found = {"logits": model.eval()(**original.example).logits.numpy()}
    assert_alike(found, outputs(original), 0.0)


def test_transformers_reads_what_is_pruned_alike_in_every_layer(model_folder: Folders, tmp_path: Path) -> None:
    import transformers

    original = opened(model_folder("bert"))
    for layer in (0, 1):
        remove_neurons(original.module, layer, list(range(layer, 40)))
    remove_neurons(original.module, 1, [0])
    folder = saved(original, tmp_path / "out")
    assert config(folder)["intermediate_size"] == 24
    assert STRUCTURE not in config(folder)
    assert config(folder)["architectures"] == ["BertModel"]
    model = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)
    with torch.no_grad():
        hidden = model.eval()(**original.example).last_hidden_state.numpy()
    assert_alike({"last_hidden_state": hidden}, {"last_hidden_state": outputs(original)["last_hidden_state"]}, 0.0)


def cluster(module: torch.nn.Module, values: int = 16) -> list[str]:
    names = []
    for name, weight in linear_weights(module):
        book = torch.linspace(-0.1, 0.1, values)
        weight.data = book[(weight.data[..., None] - book).abs().argmin(dim=-1)]
        weight.data[0, 0] = -0.0
        names.append(name)
    return names


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("kind", ["bert-dense", "bert-mlm", "vit"])
def test_clustered_weights_read_back_bit_for_bit(
    model_folder: Folders, tmp_path: Path, kind: str, pruned: bool
) -> None:
    original = opened(model_folder(kind))
    if pruned:
        remove_heads(original.module, 1, [0])
    names = cluster(original.module)
    plain = saved(original, tmp_path / "plain")
    small = saved(original, tmp_path / "small", clustered=names)
    elements = sum(weight.numel() for _, weight in linear_weights(original.module))
    assert size(plain) - size(small) > 2 * elements
    again = opened(small)
    before = dict(original.module.named_parameters())
    for name, weight in again.module.named_parameters():
        assert weight.numpy().tobytes() == before[name].detach().numpy().tobytes(), name
    assert_alike(outputs(again), outputs(original), 0.0)


def test_many_values_are_not_clustered(model_folder: Folders, tmp_path: Path) -> None:
    original = opened(model_folder("bert"))
    name = next(name for name, _ in linear_weights(original.module))
    with pytest.raises(RequestError, match="too many values"):
        save_checkpoint(original.module, tmp_path / "out", clustered=[name])
    with pytest.raises(RequestError, match=r"no\.such\.weight"):
        save_checkpoint(original.module, tmp_path / "out", clustered=["no.such.weight"])
    assert not (tmp_path / "out").exists()


def test_tensors_that_are_missing_strange_or_unlike_are_named(model_folder: Folders, tmp_path: Path) -> None:
    original = opened(model_folder("bert-classifier"))
    remove_heads(original.module, 0, [1])
    folder = saved(original, tmp_path / "out")
    state = {name: torch.from_numpy(array) for name, array in load_file(folder / "model.safetensors").items()}
    query = "bert.encoder.layer.0.attention.self.query.weight"
    short = {**state, query: state[query][:16].clone()}
    for changed in (
        {name: tensor for name, tensor in state.items() if name != query},
        short,
        {**state, query + "s": state[query].clone()},
    ):
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(RequestError, match=r"attention\.self\.query"):
            opened(folder)


def test_a_structure_in_the_file_that_does_not_fit_is_refused(model_folder: Folders, tmp_path: Path) -> None:
    original = opened(model_folder("bert"))
    remove_heads(original.module, 0, [1])
    folder = saved(original, tmp_path / "out")
    for wrong in ({"heads": [3]}, {"heads": [9, 4], "neurons": [64, 64], "shares": [0, 1]}):
        (folder / "config.json").write_text(json.dumps({**config(folder), STRUCTURE: wrong}), encoding="utf-8")
        with pytest.raises(RequestError, match=STRUCTURE):
            opened(folder)


def test_either_name_of_a_tied_tensor_will_do(model_folder: Folders) -> None:
    module = opened(model_folder("bert-mlm")).module
    tied = [
        n for n, p in module.state_dict().items() if p.data_ptr() == module.get_input_embeddings().weight.data_ptr()
    ]
    assert len(tied) == 2
    for left_out in tied:
        state = {name: tensor.clone() for name, tensor in module.state_dict().items() if name != left_out}
        with torch.no_grad():
            module.get_input_embeddings().weight.zero_()
        load_state(module, state, "memory")
        kept = next(name for name in tied if name != left_out)
        assert torch.equal(module.get_input_embeddings().weight, state[kept])


def test_an_encoder_out_of_a_changed_model_with_a_head(model_folder: Folders, tmp_path: Path) -> None:
    original = opened(model_folder("bert-classifier"))
    remove_heads(original.module, 0, [1])
    folder = saved(original, tmp_path / "out")
    encoder = opened(folder, "feature-extraction")
    with torch.no_grad():
        wanted = original.module.bert(**original.example).last_hidden_state.numpy()
    np.testing.assert_array_equal(outputs(encoder)["last_hidden_state"], wanted)
