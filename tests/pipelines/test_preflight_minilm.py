"""The real MiniLM, built by the real TensorRT for RTX: real weights keep more in FP32 than random ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.exporter.targets.tensorrt_graphs import needs_rtx
from tests.pipelines.nvidia_files import NAMES, build_files, make_files, products_in, table

LAYERS = 6
BYTES_OF_FP32 = 90_000_000


@needs_rtx
@pytest.mark.slow
def test_minilm_is_built_in_every_default_precision(
    minilm: str, tmp_path: Path, record_property: Callable[..., None]
) -> None:
    made = make_files(minilm, tmp_path, ("fp32", "fp16", "bf16", "int8"), rows=8)
    built = build_files(made, tmp_path / "engines")
    record_property("engines", table(built))
    assert {asked: one.reason for asked, one in built.items() if not one.ok} == {}
    assert len(built) == 8
    for (precision, gpu), one in built.items():
        assert set(products_in(made.paths[precision]).values()) == {NAMES[precision]}
        assert set(one.products) == {NAMES[precision]}, (precision, gpu)
        # Query, key and value may be one product, and the two products of attention one layer.
        assert 5 * LAYERS <= one.products[NAMES[precision]] <= 8 * LAYERS
        assert one.bytes is not None
        if precision == "fp32":
            assert one.bytes > BYTES_OF_FP32
        else:
            assert one.bytes < 0.8 * BYTES_OF_FP32
