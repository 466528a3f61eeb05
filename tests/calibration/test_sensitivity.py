"""The search for layers to keep: on a made-up model whose harm is known, so that the best answer is too."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from pathlib import Path

import pytest

from calibration.sensitivity import Judgement, Layer, Search, search
from exporter.artifact import Artifact, InputContract, Signature
from exporter.errors import RequestError


class Made:
    """A model of numbered layers: squares of errors add up, each layer gains a time, the gate allows so much error."""

    def __init__(self, harm: dict[str, float], allowed: float, gains: dict[str, float] | None = None) -> None:
        self.harm, self.allowed, self.gains = harm, allowed, gains
        self.layers = [Layer(name, "MatMul", None if gains is None else gains[name]) for name in harm]
        self.asked: list[frozenset[str]] = []

    def make(self, keep: Collection[str]) -> Artifact:
        assert set(keep) < set(self.harm), "all layers kept, or one that is not there"
        self.asked.append(frozenset(keep))
        return Artifact(Path(";".join(sorted(keep))), "onnx", Signature((), ()), InputContract())

    def error(self, artifact: Artifact) -> float:
        kept = set(str(artifact.path).split(";"))
        return math.sqrt(sum(harm**2 for name, harm in self.harm.items() if name not in kept))

    def judge(self, artifact: Artifact) -> Judgement:
        error = self.error(artifact)
        return Judgement(error <= self.allowed, error, f"{error:.3f}")

    def seconds(self, artifact: Artifact) -> float:
        assert self.gains is not None
        kept = set(str(artifact.path).split(";"))
        return 1.0 + sum(gain for name, gain in self.gains.items() if name in kept)

    def search(self) -> Search:
        time = None if self.gains is None else self.seconds
        return search(self.layers, self.make, measure=self.error, evaluate=self.judge, time=time)


def harmless(count: int, **harmful: float) -> dict[str, float]:
    return {f"layer{i}": harmful.get(f"layer{i}", 0.01) for i in range(count)}


def test_the_harmful_layers_and_no_others_are_kept() -> None:
    model = Made(harmless(48, layer7=3.0, layer8=2.0, layer40=1.0), allowed=0.5)
    found = model.search()
    assert found.passed
    assert found.kept == {"layer7", "layer8", "layer40"}
    assert [cost.layer.name for cost in found.costs[:3]] == ["layer7", "layer8", "layer40"]
    assert [cost.together for cost in found.costs[:3]] == [1, 1, 1]
    assert found.costs[0].error == pytest.approx(3.0)
    assert len(found.costs) == 48
    assert sum(cost.cost for cost in found.costs) == pytest.approx(1)
    # Far fewer forms than one per layer: groups without harm are not divided.
    assert found.runs == len(model.asked) < 48


@pytest.mark.parametrize("seed", range(8))
def test_as_few_are_kept_as_the_best_choice_of_all_keeps(seed: int) -> None:
    import random

    draw = random.Random(seed)
    harm = {f"layer{i}": draw.choice([0.05, 0.2, 1.0, 2.0]) * draw.uniform(0.8, 1.2) for i in range(8)}
    model = Made(harm, allowed=0.9)
    found = model.search()
    fewest = min(
        len(kept)
        for size in range(8)
        for kept in itertools.combinations(harm, size)
        if model.judge(model.make(kept)).passed
    )
    assert found.passed
    assert len(found.kept) == fewest


def test_a_layer_that_gains_nothing_is_kept_before_one_that_gains_much() -> None:
    harm = {"slow": 1.0, "fast": 1.1, "a": 0.01, "b": 0.01}
    model = Made(harm, allowed=1.2, gains={"slow": 0.01, "fast": 1.0, "a": 0.5, "b": 0.5})
    found = model.search()
    assert found.kept == {"slow"}
    assert {cost.layer.name: cost.gained_s for cost in found.costs} == pytest.approx(
        {"slow": 0.01, "fast": 1.0, "a": 0.5, "b": 0.5}
    )


def test_nothing_is_measured_where_the_gate_passes_anyway() -> None:
    model = Made(harmless(5), allowed=1.0)
    found = model.search()
    assert (found.passed, found.kept, found.costs, found.runs) == (True, frozenset(), (), 1)


def test_where_nothing_passes_the_closest_is_told() -> None:
    model = Made(harmless(6, layer2=1.0), allowed=1e-6)
    found = model.search()
    assert not found.passed
    assert len(found.kept) == 5
    assert min(step["drop"] for step in found.steps) == pytest.approx(0.01)
    assert found.to_dict()["passed"] is False


def test_a_single_layer_is_never_kept_alone() -> None:
    found = Made({"only": 1.0}, allowed=0.5).search()
    assert (found.passed, found.kept) == (False, frozenset())


def test_no_layers_and_no_figure_are_refused() -> None:
    with pytest.raises(RequestError, match="nothing to search"):
        Made({}, 1.0).search()
    with pytest.raises(RequestError, match="no finite error"):
        Made({"a": math.nan, "b": 1.0}, 0.1).search()
