"""Running a graph that was given further outputs to observe its tensors by."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir
    import onnxruntime


@contextmanager
def observed_session(graph: ir.Model, threads: int) -> Iterator[onnxruntime.InferenceSession]:
    """ONNX Runtime over a changed graph, from a file in a temporary folder; a tensor is reduced as soon as it is there.

    Args:
        graph: The graph with its further outputs.
        threads: Within an operator.
    """
    from exporter.onnx_files import save_model
    from exporter.targets.onnxruntime import open_cpu_session

    with tempfile.TemporaryDirectory(prefix=".planish-calibration-") as folder:
        path = save_model(graph, Path(folder) / "observed.onnx")
        yield open_cpu_session(path, threads, early=True)


def run_batch(
    session: onnxruntime.InferenceSession, batch: Mapping[str, np.ndarray], names: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Outputs by name (all, if no names are given); arrays of the batch that the graph does not read are left out."""
    wanted = {value.name for value in session.get_inputs()}
    asked = [value.name for value in session.get_outputs()] if names is None else list(names)
    feed = {name: array for name, array in batch.items() if name in wanted}
    return dict(zip(asked, session.run(asked, feed), strict=True))
