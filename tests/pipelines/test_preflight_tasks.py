"""Every small model, in every precision that TensorRT takes, built for GPUs that are not there by the real library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import pytest

from exporter.tasks import tasks
from pipelines.preflight import GPUS
from tests.exporter.targets.tensorrt_graphs import needs_rtx
from tests.models import KINDS
from tests.pipelines.nvidia_files import NAMES, Files, build_files, make_files, products_in, table

if TYPE_CHECKING:
    from tests.exporter.targets.simulated_cuda.process import SimulatedGpu

MODULES = ("conv_factory", "sequence_factory")
LIKE_OTHERS = ("bert-dense", "bert-plain")
"""Kinds that differ from another in what is outside of the products."""


def test_every_task_has_a_small_model() -> None:
    assert {kind.task for kind in KINDS.values()} | {"custom"} == set(tasks())


@pytest.fixture(scope="module", params=[*(kind for kind in KINDS if kind not in LIKE_OTHERS), *MODULES])
def made(
    request: pytest.FixtureRequest, model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Files:
    kind = request.param
    spec = f"tests.models:{kind}" if kind in MODULES else str(model_folder(kind))
    return make_files(spec, tmp_path_factory.mktemp(kind))


@needs_rtx
@pytest.mark.slow
def test_a_small_model_is_built_in_every_precision(
    made: Files, tmp_path: Path, record_property: Callable[..., None]
) -> None:
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


@pytest.mark.slow
def test_onnxruntimes_cuda_provider_takes_and_captures_a_small_model(made: Files, simulated_gpu: SimulatedGpu) -> None:
    """The real provider, whose kernels do nothing on a simulated GPU: where nodes are placed, and what is captured."""
    if "Conv" in {node.op_type for node in onnx.load(made.paths["fp32"]).graph.node}:
        pytest.skip("convolutions are not simulated")
    axes = {axis.name: axis for axis in made.exported.signature.axes}
    shapes = []
    for batch, sequence in ((1, 8), (4, 16), (2, 33)):
        lengths = {
            name: min(max(batch if name == "batch" else sequence, axis.min), axis.max) for name, axis in axes.items()
        }
        inputs = made.exported.signature.inputs
        shapes.append({spec.name: [lengths.get(length, length) for length in spec.shape] for spec in inputs})
    files = [str(made.paths[precision]) for precision in ("fp32", "fp16", "bf16")]
    told = simulated_gpu.run("placed", files=files, signature=made.exported.signature.to_dict(), shapes=shapes)
    assert told["refused"] == []
    for file in files:
        one = told["files"][file]
        assert one["graphs"] == "captured", file
        assert one["captured"] == len(shapes)
        # What is left to the processor are lengths, which a captured graph has as they were.
        assert one["nodes"]["CUDAExecutionProvider"] > 10 * one["nodes"].get("CPUExecutionProvider", 0)
