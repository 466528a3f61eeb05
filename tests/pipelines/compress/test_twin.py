from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from exporter.structure import layer_parts, layers_of
from pipelines.compress.twin import fill_zeros
from tests.exporter.structure.planted import opened
from tests.pipelines.compress.planted import prune

Folders = Callable[..., Path]


def test_the_twin_has_no_zeros_and_keeps_the_rest(model_folder: Folders) -> None:
    module = opened(model_folder("bert")).module
    with torch.no_grad():
        prune(0.9)(module)
        layers_of(module)[1].load_state_dict(layers_of(module)[0].state_dict())
        layer_parts(module, 1).down.weight.zero_()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    filled = fill_zeros(module)
    weights = {n: p for n, p in module.named_parameters() if p.dim() == 2 and n.startswith("encoder.layer")}
    assert filled == sum(int((before[name] == 0).sum()) for name in weights)
    for name, parameter in module.named_parameters():
        kept = before[name] != 0 if name in weights else torch.ones_like(before[name], dtype=torch.bool)
        assert torch.equal(parameter[kept], before[name][kept]), name
    for name, weight in weights.items():
        assert (weight != 0).all()
        others = before[name][before[name] != 0]
        deviation = float(others.std()) if len(others) else 0.02
        assert 0.9 < float(weight[before[name] == 0].std()) / deviation < 1.1, name
    assert torch.equal(layer_parts(module, 0).query.weight, layer_parts(module, 1).query.weight)
    assert fill_zeros(module) == 0


def test_the_twin_of_a_model_is_always_the_same(model_folder: Folders) -> None:
    found = []
    for _ in range(2):
        module = opened(model_folder("vit")).module
        with torch.no_grad():
            prune(0.5)(module)
        fill_zeros(module)
        found.append(layer_parts(module, 0).up.weight.clone())
    assert torch.equal(*found)
