"""Every small model, in every precision that TensorRT takes, built for GPUs that are not there by the real library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.tasks import tasks
from pipelines.preflight import GPUS
from tests.exporter.targets.tensorrt_graphs import needs_rtx
from tests.models import KINDS
from tests.pipelines.nvidia_files import NAMES, build_files, make_files, products_in, table

MODULES = ("conv_factory", "sequence_factory")
LIKE_OTHERS = ("bert-dense", "bert-plain")
"""Kinds that differ from another in what is outside of the products."""


def test_every_task_has_a_small_model() -> None:
    assert {kind.task for kind in KINDS.values()} | {"custom"} == set(tasks())


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("kind", [*(kind for kind in KINDS if kind not in LIKE_OTHERS), *MODULES])
def test_a_small_model_is_built_in_every_precision(
    model_folder: Callable[..., Path], tmp_path: Path, record_property: Callable[..., None], kind: str
) -> None:
    made = make_files(f"tests.models:{kind}" if kind in MODULES else str(model_folder(kind)), tmp_path)
    assert set(made.paths) == set(NAMES)
    written = {precision: products_in(path) for precision, path in made.paths.items()}
    for precision, products in written.items():
        others = {name for name, kind_of in products.items() if kind_of != NAMES[precision]}
        assert others == made.kept[precision] & set(products), precision  # each is in the record, with its reason
        assert len(others) < len(products)

    built = build_files(made, tmp_path / "engines")
    record_property("engines", table(built))
    assert {asked: one.reason for asked, one in built.items() if not one.ok} == {}
    for (precision, gpu), one in built.items():
        assert set(one.products) == set(written[precision].values()), (precision, gpu, one.products)
        assert 0 < sum(one.products.values()) <= len(written[precision])
        assert one.bytes is not None
        assert one.bytes > 0
        assert one.seconds is not None
        assert sum(one.layers.values()) > sum(one.products.values())
    assert {gpu for _, gpu in built} == set(GPUS)
