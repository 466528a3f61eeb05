"""The fused form for ONNX Runtime's CPU provider: `com.microsoft` operators, for that runtime only."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.errors import InternalError
from exporter.passes.base import FUSED_RMS, Pass, PassContext, PassRecord
from exporter.passes.graphs import Diff, remove_dead

if TYPE_CHECKING:
    import onnx_ir as ir

STANDARD_DOMAINS = frozenset(("", "ai.onnx.ml"))
FUSED_DOMAIN = "com.microsoft"


def can_fuse() -> bool:
    """Whether the installed transformers has the fusions; nothing of it is imported."""
    found = importlib.util.find_spec("transformers")
    folders = (found and found.submodule_search_locations) or []
    return any((Path(folder) / "exporters" / "onnxruntime_fusions.py").is_file() for folder in folders)


class FuseForOnnxRuntime(Pass):
    """transformers' fusions for ONNX Runtime on CPU, which run onnxscript's and repair what the runtime rejects."""

    name = "fuse_onnxruntime"
    why = "groups of operators become ONNX Runtime's fused kernels; the model runs on that runtime only"
    rms_bound = FUSED_RMS

    def apply(self, model: ir.Model, context: PassContext) -> PassRecord:
        from onnx_ir.passes import common
        from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

        if any(node.domain == FUSED_DOMAIN for node in model.graph.all_nodes()):
            return PassRecord(self.name, "the graph is fused already")
        diff = Diff(model)
        fuse_for_onnxruntime(model, "cpu")
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        common.DeduplicateInitializersPass()(model)
        for value in model.graph.initializers.values():
            # The fusions record a rank of 0 for the scales that they store with rank 1.
            if value.const_value is not None:
                value.shape = value.const_value.shape.copy()
        remove_dead(model)
        return self.record(diff.changes(model, "part of a fused kernel", "a fused kernel or its preparation"))

    def ensures(self, model: ir.Model, context: PassContext) -> None:
        domains = {node.domain for node in model.graph.all_nodes()} - STANDARD_DOMAINS - {FUSED_DOMAIN}
        if domains:
            raise InternalError("operators are left that no runtime has", ", ".join(sorted(domains)))


def is_portable(model: ir.Model) -> bool:
    """Whether every operator is a standard one, which any runtime may have."""
    return {node.domain for node in model.graph.all_nodes()} <= STANDARD_DOMAINS
