"""The PyTorch baselines as sessions: the original run eagerly, and through `torch.compile`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.artifact import Artifact, Variant
from exporter.errors import RequestError
from exporter.targets.base import Array, Binding, Session, get_target

if TYPE_CHECKING:
    from exporter.original import Original

OPENER = "pipelines.verify.baselines:open_baseline"
MODES = ("eager", "compile")


class TorchBinding(Binding):
    """Input tensors that share memory with the bound arrays."""

    def __init__(self, run: Any, arrays: dict[str, Array]) -> None:
        import torch

        self._run = run
        self._arrays = arrays
        self._tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        self._outputs: dict[str, Any] = {}

    def run(self) -> None:
        import torch

        with torch.inference_mode():
            self._outputs = self._run(**self._tensors)

    def outputs(self) -> dict[str, Any]:
        return dict(self._outputs)


class TorchSession(Session):
    """The original's module, as it is or compiled.

    Args:
        original: An original with a PyTorch module.
        mode: ``"eager"`` or ``"compile"``: PyTorch's defaults, so what its users get. Compilation happens when a
            shape first runs.
        threads: Compute threads.
    """

    def __init__(self, original: Original, mode: str, threads: int) -> None:
        import torch

        artifact = Artifact(Path(original.source.spec), "pytorch", original.signature, original.contract)
        super().__init__(artifact)
        torch.set_num_threads(threads)
        self._compiled = mode == "compile"
        self._module = torch.compile(original.module) if self._compiled else original.module

    def _bind(self, arrays: dict[str, Array]) -> TorchBinding:
        return TorchBinding(self._module, arrays)

    def run(self, inputs: Any) -> dict[str, Array]:
        binding = self.bind(inputs)
        binding.run()
        return {name: np.array(value.numpy()) for name, value in binding.outputs().items()}

    def executed(self) -> dict[str, Any]:
        """What ran so far; ``graphs`` and ``graph_breaks`` count what `torch.compile` made, where it was asked to."""
        import torch

        ran: dict[str, Any] = {"runtime": f"torch {torch.__version__}", "device": "cpu", "precision": "fp32"}
        ran["mode"] = "eager"
        if self._compiled:
            from torch._dynamo.utils import counters

            ran["graphs"] = int(counters["stats"]["unique_graphs"])
            ran["graph_breaks"] = int(sum(counters["graph_break"].values()))
            if ran["graphs"]:  # it falls back to eager without an error
                ran["mode"] = "compile"
        return ran


def open_baseline(arguments: dict[str, Any], *, threads: int) -> Session:
    """Open the original as a baseline.

    Args:
        arguments: ``original`` (see `pipelines.stages.opening.open_from`) and ``mode``: one of `MODES`. The original
            of an ONNX source is that file in ONNX Runtime, and it has no ``compile``.
        threads: Compute threads.

    Raises:
        RequestError: The source cannot be opened, or the mode does not suit it.
    """
    # A pool of compile workers would be a process group of its own, which goes on while this worker is stopped.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    from pipelines.stages.opening import open_from

    mode = arguments["mode"]
    if mode not in MODES:
        raise RequestError("unknown mode of the baseline", mode, f"Known modes: {', '.join(MODES)}")
    original = open_from(arguments)
    if original.module is not None:
        return TorchSession(original, mode, threads)
    if mode != "eager" or original.source.path is None:
        raise RequestError("an ONNX source has no PyTorch module to compile", original.source.spec)
    artifact = Artifact(original.source.path, "onnx", original.signature, original.contract)
    return get_target("onnxruntime-cpu").open(artifact, Variant("onnxruntime-cpu", "fp32"), threads=threads)
