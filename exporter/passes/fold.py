"""Constant folding, dead code, and the exact algebraic rules that onnxscript knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporter.passes.base import FUSED_RMS, Pass, PassContext, PassRecord
from exporter.passes.graphs import Diff, remove_dead, remove_identities

if TYPE_CHECKING:
    import onnx_ir as ir


_LARGE_BYTES = 1 << 20


class FoldConstants(Pass):
    """Inline functions, compute what is constant, drop dead code; a weight that others read is never copied."""

    name = "fold"
    why = "what does not depend on the inputs is computed once, and what nothing reads is removed"

    def apply(self, model: ir.Model, context: PassContext) -> PassRecord:
        from onnx_ir.passes import common
        from onnxscript import optimizer

        diff = Diff(model)
        common.InlinePass()(model)
        optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=_copies_no_weight)
        remove_identities(model)
        remove_dead(model)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        common.RemoveInitializersFromInputsPass()(model)
        remove_dead(model)
        return self.record(diff.changes(model, "constant or read by nothing", "replaces what was folded"))


def _copies_no_weight(node: ir.Node) -> bool | None:
    """No to a large constant that other nodes read as well, as a tied embedding; else as onnxscript decides."""
    for value in node.inputs:
        tensor = None if value is None else value.const_value
        if value is not None and tensor is not None and tensor.nbytes >= _LARGE_BYTES and len(value.uses()) > 1:
            return False
    return None


class Simplify(Pass):
    """onnxscript's standard rewrite rules: operators that do nothing, that cancel, or that merge into one.

    Among them is the merging of a batch normalization into the convolution before it, which changes the weights: hence
    the wider bound.
    """

    name = "simplify"
    why = "operators that do nothing or cancel are removed, and those that one operator can do are merged"
    rms_bound = FUSED_RMS

    def apply(self, model: ir.Model, context: PassContext) -> PassRecord:
        from onnx_ir.passes import common
        from onnxscript import rewriter

        diff = Diff(model)
        rewriter.rewrite(model)
        remove_identities(model)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        remove_dead(model)
        return self.record(diff.changes(model, "does nothing, or merged into another", "does the work of those merged"))
