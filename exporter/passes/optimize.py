"""The verb: optimize an ONNX file, with every pass checked on real inputs and recorded."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from exporter import onnx_files
from exporter.artifact import InputContract
from exporter.errors import RequestError
from exporter.passes.base import Pass, PassContext, Pipeline, run_pass
from exporter.passes.dedupe import Deduplicate
from exporter.passes.fold import FoldConstants, Simplify
from exporter.passes.fuse_onnxruntime import FuseForOnnxRuntime, is_portable
from exporter.passes.masks import SimplifyMasks
from exporter.passes.shapes import SimplifyShapes
from exporter.passes.softmax_guard import RemoveSoftmaxGuards


def default_pipeline(contract: InputContract, *, fuse: bool = False) -> Pipeline:
    """The passes that make the portable FP32 graph, in order.

    Args:
        contract: What callers promise; without ``attends`` the guards around softmax are not even looked at.
        fuse: Add the fusions for ONNX Runtime, which make the graph run there only.
    """
    clean: list[Pass] = [FoldConstants(), Simplify(), SimplifyShapes(), SimplifyMasks()]
    if contract.attends:
        clean.append(RemoveSoftmaxGuards())
    # What these made constant or a no-op goes as well.
    clean += [FoldConstants(), Simplify(), Deduplicate()]
    if not fuse:
        return Pipeline(clean, name="portable", why="the portable graph: standard operators, nothing superfluous")
    # The fusions leave shape arithmetic and broadcast masks of their own behind.
    again = Pipeline([SimplifyShapes(), SimplifyMasks(), Deduplicate()], name="clean_fused")
    portable = Pipeline(clean, name="portable")
    return Pipeline(
        [portable, FuseForOnnxRuntime(), again], name="fused", why="the graph for ONNX Runtime's CPU provider"
    )


def optimize(
    path_in: Path | str,
    path_out: Path | str,
    *,
    contract: InputContract,
    samples: Iterable[dict[str, np.ndarray]],
    fuse: bool = False,
    external_data: bool | None = None,
) -> dict[str, Any]:
    """Run the default pipeline over the model at `path_in` and write the result to `path_out`.

    The weights stay in memory-mapped files all the way, so that memory stays near their size. Equal inputs give equal
    bytes, wherever the files are.

    Args:
        path_in: An ONNX model; it is only read.
        path_out: Where the result goes, with its weights beside it when they are too large for one file.
        contract: What callers promise about inputs.
        samples: Real inputs, batched, on which every pass is checked; at least one, better several shapes.
        fuse: Make the fused form for ONNX Runtime on CPU instead of the portable one.
        external_data: As `exporter.onnx_files.save_model` has it.

    Returns:
        ``{"passes": [{"name", "changed", "why", "changes", "max_abs_difference", "rms_relative"}, …],
        "nodes_before", "nodes_after", "operators", "max_abs_difference", "rms_relative", "portable"}``, all JSON.

    Raises:
        RequestError: The input file is bad, or there are no samples.
        InternalError: A pass broke the model; it is named.
    """
    path_in, path_out = Path(path_in), Path(path_out)
    samples = list(samples)
    if not samples:
        raise RequestError("there are no samples to check the graph passes on", path_in, "Give at least one batch")
    if path_in.resolve() == path_out.resolve():
        raise RequestError("the optimized model would overwrite its input", path_in, "Give another output path")
    path_out.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".planish-optimize-", dir=path_out.parent) as folder,
        PassContext(contract, samples, Path(folder)) as context,
    ):
        model = onnx_files.load_model(path_in)
        if onnx_files.has_embedded_weights(model):
            # Once into a file, then mapped: every check opens them from there instead of writing them again.
            spilled = onnx_files.save_model(model, Path(folder) / "model.onnx", external_data=True)
            model = onnx_files.load_model(spilled)
        nodes_before = model.graph.num_nodes()
        record = run_pass(default_pipeline(contract, fuse=fuse), model, context)
        onnx_files.strip_metadata(model)
        onnx_files.save_model(model, path_out, external_data=external_data)
        operators = [f"{node.domain}::{node.op_type}".lstrip(":") for node in model.graph.all_nodes()]
        return {
            "passes": [leaf.to_dict() for leaf in record.leaves()],
            "nodes_before": nodes_before,
            "nodes_after": model.graph.num_nodes(),
            "operators": {name: operators.count(name) for name in sorted(set(operators))},
            "max_abs_difference": record.max_abs_difference,
            "rms_relative": record.rms_relative,
            "portable": is_portable(model),
        }
