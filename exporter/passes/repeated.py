"""Passes that go over the graph more than once."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from exporter.passes.base import Change, Pass, PassContext, PassRecord
from exporter.passes.graphs import infer_missing, remove_dead

if TYPE_CHECKING:
    import onnx_ir as ir


class RepeatedPass(Pass):
    """A pass that goes over the graph again as long as it finds something (a few times at most), as one simplification
    lets the next one apply. Subclasses implement `round`."""

    rounds = 8

    @abstractmethod
    def round(self, graph: ir.Graph) -> list[Change]:
        """Change `graph` in place and say what was changed; nothing to say ends the pass."""

    def apply(self, model: ir.Model, context: PassContext) -> PassRecord:
        changes: list[Change] = []
        infer_missing(model)
        for _ in range(self.rounds):
            found = self.round(model.graph)
            remove_dead(model)
            changes += found
            if not found:
                break
        return self.record(changes)
