from __future__ import annotations

import math

from exporter.artifact import Variant
from pipelines.select import Candidate, select


def candidate(target: str, speedups: dict[str, tuple[float, float]], *, precision="fp32", form=None, portable=True):
    return Candidate(Variant(target, precision, form), portable, speedups)


def test_the_best_lower_bound_wins_where_intervals_are_apart():
    plain = candidate("onnxruntime-cpu", {"1x16": (2.0, 2.1), "8x128": (1.0, 1.1)})
    engine = candidate("inductor-cpu", {"1x16": (1.5, 1.6), "8x128": (1.4, 1.5)}, portable=False)
    chosen = select([plain, engine], ["1x16", "8x128"])
    assert chosen["1x16"] == "onnxruntime-cpu-fp32"
    assert chosen["8x128"] == "inductor-cpu-fp32"
    # Geometric means of lower bounds: sqrt(2.0 * 1.0) = 1.414 below sqrt(1.5 * 1.4) = 1.449, but the intervals overlap.
    assert math.sqrt(2.0 * 1.0) < math.sqrt(1.5 * 1.4) < math.sqrt(2.1 * 1.1)
    assert chosen["overall"] == "onnxruntime-cpu-fp32"


def test_the_simpler_form_wins_where_intervals_overlap():
    plain = candidate("onnxruntime-cpu", {"1x16": (1.9, 2.05)})
    fused = candidate("onnxruntime-cpu", {"1x16": (2.0, 2.2)}, form="fused")
    int8 = candidate("onnxruntime-cpu", {"1x16": (2.02, 2.3)}, precision="int8")
    assert select([int8, fused, plain], ["1x16"])["1x16"] == "onnxruntime-cpu-fp32"


def test_int8_wins_when_it_is_clearly_faster():
    plain = candidate("onnxruntime-cpu", {"1x16": (1.9, 2.0)})
    int8 = candidate("onnxruntime-cpu", {"1x16": (3.9, 4.1)}, precision="int8")
    assert select([plain, int8], ["1x16"]) == {"overall": "onnxruntime-cpu-int8", "1x16": "onnxruntime-cpu-int8"}


def test_overall_needs_every_point():
    everywhere = candidate("onnxruntime-cpu", {"1x16": (1.5, 1.6), "1x32": (1.5, 1.6)})
    somewhere = candidate("openvino-cpu", {"1x16": (3.0, 3.1)})
    chosen = select([everywhere, somewhere], ["1x16", "1x32"])
    assert chosen == {
        "overall": "onnxruntime-cpu-fp32",
        "1x16": "openvino-cpu-fp32",
        "1x32": "onnxruntime-cpu-fp32",
    }


def test_without_timing_the_simplest_is_chosen_and_without_candidates_nothing():
    plain, engine = candidate("onnxruntime-cpu", {}), candidate("inductor-cpu", {}, portable=False)
    assert select([engine, plain], []) == {"overall": "onnxruntime-cpu-fp32"}
    assert select([], ["1x16"]) == {"overall": None, "1x16": None}
