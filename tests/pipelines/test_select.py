from __future__ import annotations

import math
import random

import pytest

from exporter.artifact import Variant
from pipelines.select import Candidate, select
from pipelines.verification.latency_result import Rounds, compare

ROUNDS = 11
POINTS = ["1x16", "8x128"]


def steady(duration: float, *, jitter: float = 0.01, seed: int = 0) -> Rounds:
    """A duration in each round, with noise of its own."""
    noise = random.Random(f"{duration} {seed}")
    return {(0, number): duration * (1 + jitter * noise.uniform(-1, 1)) for number in range(ROUNDS)}


def candidate(target: str, rounds: dict[str, Rounds], *, precision="fp32", form=None, portable=True):
    return Candidate(Variant(target, precision, form), portable, rounds)


def test_the_fastest_wins_at_each_point_and_in_the_mean():
    plain = candidate("onnxruntime-cpu", {"1x16": steady(5.0), "8x128": steady(100.0)})
    engine = candidate("inductor-cpu", {"1x16": steady(6.0), "8x128": steady(60.0)}, portable=False)
    chosen = select([plain, engine], POINTS, {"1x16": steady(10.0), "8x128": steady(150.0)})
    assert chosen == {
        "1x16": "onnxruntime-cpu-fp32",
        "8x128": "inductor-cpu-fp32",
        "overall": "inductor-cpu-fp32",  # sqrt(6 * 60) < sqrt(5 * 100)
    }


def test_the_simpler_form_wins_where_the_rounds_do_not_tell_two_apart():
    plain = candidate("onnxruntime-cpu", {"1x16": steady(5.0, jitter=0.2)})
    fused = candidate("onnxruntime-cpu", {"1x16": steady(4.95, jitter=0.2)}, form="fused")
    int8 = candidate("onnxruntime-cpu", {"1x16": steady(4.97, jitter=0.2)}, precision="int8")
    assert select([int8, fused, plain], ["1x16"], {"1x16": steady(10.0)})["1x16"] == "onnxruntime-cpu-fp32"


def test_a_baseline_that_moves_does_not_hide_who_is_faster():
    """Over eager the two overlap, round by round one is 10 % faster: that counts."""
    eager = {"1x16": steady(10.0, jitter=0.4)}
    plain = candidate("onnxruntime-cpu", {"1x16": steady(5.0)})
    int8 = candidate("onnxruntime-cpu", {"1x16": steady(4.5)}, precision="int8")
    slower, faster = (compare(eager["1x16"], c.rounds["1x16"], eager["1x16"], seed=0) for c in (plain, int8))
    assert slower is not None
    assert faster is not None
    assert slower.high > faster.low
    assert set(select([plain, int8], ["1x16"], eager).values()) == {"onnxruntime-cpu-int8"}


def test_those_of_different_groups_are_compared_through_the_baseline():
    def moved(rounds: Rounds) -> Rounds:
        return {(1, number): 3 * duration for (_, number), duration in rounds.items()}  # a slower hour

    eager = {**steady(10.0), **moved(steady(10.0))}
    plain = candidate("onnxruntime-cpu", {"1x16": steady(5.0)})
    int8 = candidate("openvino-cpu", {"1x16": moved(steady(4.0))}, precision="int8")
    assert select([plain, int8], ["1x16"], {"1x16": eager})["1x16"] == "openvino-cpu-int8"


def test_overall_needs_every_point():
    everywhere = candidate("onnxruntime-cpu", {"1x16": steady(6.0), "8x128": steady(6.0)})
    somewhere = candidate("openvino-cpu", {"1x16": steady(3.0)})
    chosen = select([everywhere, somewhere], POINTS, {"1x16": steady(9.0), "8x128": steady(9.0)})
    assert chosen == {
        "overall": "onnxruntime-cpu-fp32",
        "1x16": "openvino-cpu-fp32",
        "8x128": "onnxruntime-cpu-fp32",
    }


def test_without_timing_the_simplest_is_chosen_and_without_candidates_nothing():
    plain, engine = candidate("onnxruntime-cpu", {}), candidate("inductor-cpu", {}, portable=False)
    assert select([engine, plain], [], {}) == {"overall": "onnxruntime-cpu-fp32"}
    assert select([engine, plain], ["1x16"], {})["1x16"] == "onnxruntime-cpu-fp32"
    assert select([], ["1x16"], {}) == {"overall": None, "1x16": None}


def test_durations_that_are_not_positive_are_refused():
    broken = candidate("onnxruntime-cpu", {"1x16": {(0, 0): math.nan}})
    with pytest.raises(ValueError, match="positive and finite"):
        select([broken], ["1x16"], {"1x16": {(0, 0): 1.0}})
