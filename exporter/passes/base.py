"""What a graph pass is, and how one is run: require, apply, ensure, check the graph, compare on real inputs."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.artifact import InputContract
from exporter.errors import InternalError, PlanishError
from exporter.passes import checks

if TYPE_CHECKING:
    import onnx_ir as ir

EXACT_RMS = 1e-6
"""Bound for passes that keep every arithmetic operation, or at most the order of its sums.

Such a pass moves a result by roundings of FP32, each at most u = 2^-24 = 6e-8 of its value. Where n of them are
independent they add up as sqrt(n) u: 1e-6 allows n = 280, that is every operator of a twelve-layer encoder rounding
differently once. Most passes give exactly the same bits.
"""

_REMEDY = "This is a bug in the pass; leave it out of the pipeline and report it"

FUSED_RMS = 1e-5
"""Bound for fused kernels, which evaluate whole formulas (layer norm, GELU, softmax) in another way."""


@dataclass(frozen=True)
class Change:
    """One thing that a pass did.

    Attributes:
        node: Name of the node (or initializer) that was removed, added or rewritten.
        op: Its operator, or ``"Initializer"``.
        why: Why this was right, in a phrase.
    """

    node: str
    op: str
    why: str


@dataclass(frozen=True)
class PassRecord:
    """What a pass did and how far its result is from the input graph.

    Attributes:
        name: The pass.
        why: What the pass is for.
        changes: What it changed, in order.
        max_abs_difference: Largest absolute difference of any output on the samples; ``None`` without samples.
        rms_relative: Worst RMS relative error of any output; ``None`` without samples.
        parts: The records of a pipeline's passes.
    """

    name: str
    why: str
    changes: tuple[Change, ...] = ()
    max_abs_difference: float | None = None
    rms_relative: float | None = None
    parts: tuple[PassRecord, ...] = ()

    @property
    def changed(self) -> int:
        """Number of changes, those of the parts included."""
        return len(self.changes) + sum(part.changed for part in self.parts)

    def leaves(self) -> list[PassRecord]:
        """The records of the passes that did the work, in the order in which they ran."""
        return [leaf for part in self.parts for leaf in part.leaves()] if self.parts else [self]

    def to_dict(self) -> dict[str, Any]:
        """As JSON for ``report.json`` and evidence."""
        return {
            "name": self.name,
            "changed": self.changed,
            "why": self.why,
            "changes": [{"node": c.node, "op": c.op, "why": c.why} for c in self.changes],
            "max_abs_difference": self.max_abs_difference,
            "rms_relative": self.rms_relative,
        }


@dataclass
class PassContext:
    """What passes may rely on, and the reference that their results are compared with. A context manager.

    Attributes:
        contract: The input contract; a pass may rely on it and on nothing else.
        samples: Real inputs, batched, by input name.
        folder: Where check files are written; a temporary folder when not given.
        expected: Outputs of the input graph on `samples`, computed when the first pass runs.
        measured: Largest absolute difference and worst RMS relative error of the graph as it is now.
        rms_bound: What that error may be: the widest bound of the passes that have changed the graph so far.
    """

    contract: InputContract = field(default_factory=InputContract)
    samples: Iterable[dict[str, np.ndarray]] = ()
    folder: Path | None = None
    expected: list[dict[str, np.ndarray]] | None = None
    measured: tuple[float, float] | None = None
    rms_bound: float = 0.0
    _temporary: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.samples = list(self.samples)
        self._temporary = tempfile.TemporaryDirectory(prefix=".planish-passes-", dir=self.folder)

    def __enter__(self) -> PassContext:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()

    def run(self, model: ir.Model) -> list[dict[str, np.ndarray]]:
        """Outputs of `model` on the samples."""
        if self._temporary is None:
            raise InternalError("the pass context is closed")
        return checks.run_model(model, list(self.samples), Path(self._temporary.name))


class Pass(ABC):
    """One step over a graph. Subclasses set `name` and `why` and implement `apply`; `run_pass` runs them."""

    name: str
    why: str
    rms_bound: float = EXACT_RMS
    """Largest RMS relative error, against the input graph, at which the pass counts as having kept the model true."""

    def requires(self, model: ir.Model, context: PassContext) -> None:  # noqa: B027 - most require nothing
        """Raise a `PlanishError` where `apply` cannot work on this model."""

    @abstractmethod
    def apply(self, model: ir.Model, context: PassContext) -> PassRecord:
        """Change `model` in place and say what was changed."""

    def ensures(self, model: ir.Model, context: PassContext) -> None:  # noqa: B027 - parity is checked for all
        """Raise `InternalError` where `model` is not what the pass promises."""

    def record(self, changes: Iterable[Change]) -> PassRecord:
        """The record of this pass with `changes`."""
        return PassRecord(self.name, self.why, tuple(changes))


class Pipeline(Pass):
    """Passes one after the other, as one pass. Each is run, checked and recorded on its own.

    Args:
        passes: In order; pipelines among them are fine.
        name: The name of the whole.
        why: What it is for.
    """

    name = "pipeline"
    why = "its passes, in order"

    def __init__(self, passes: Sequence[Pass], *, name: str | None = None, why: str | None = None) -> None:
        self.passes = tuple(passes)
        self.name, self.why = name or self.name, why or self.why

    def apply(self, model: ir.Model, context: PassContext) -> PassRecord:
        return PassRecord(self.name, self.why, parts=tuple(run_pass(step, model, context) for step in self.passes))


def run_pass(step: Pass, model: ir.Model, context: PassContext) -> PassRecord:
    """Run one pass over `model`, in place, and prove that the model still computes the same.

    The reference is the graph that the first pass of `context` was given, so that small errors cannot add up unseen.

    Returns:
        The pass's record with its measured differences.

    Raises:
        InternalError: Names the pass, and the output and its error, the checker's message or the broken promise.
    """
    if context.expected is None:
        context.expected = context.run(model) if context.samples else []
        context.measured = (0.0, 0.0) if context.samples else None
    step.requires(model, context)
    interface, structure = checks.interface(model), checks.structure(model)
    record = _applied(step, model, context)
    if checks.interface(model) != interface:
        raise InternalError(
            f"the graph pass {step.name!r} changed the model's inputs or outputs",
            f"{interface} became {checks.interface(model)}",
            _REMEDY,
        )
    if not isinstance(step, Pipeline) and checks.structure(model) != structure:
        _named(step, lambda: checks.check_graph(model))
        if context.expected:
            context.measured = _measure(step, model, context)
    _named(step, lambda: step.ensures(model, context))
    max_abs, rms = context.measured or (None, None)
    return replace(record, max_abs_difference=max_abs, rms_relative=rms)


def _applied(step: Pass, model: ir.Model, context: PassContext) -> PassRecord:
    try:
        record = step.apply(model, context)
        _name_apart(model)
        return record
    except PlanishError:
        raise
    except Exception as error:  # whatever a library's pass raises, the user learns which pass it was
        raise InternalError(f"the graph pass {step.name!r} failed", repr(error), _REMEDY) from error


def _name_apart(model: ir.Model) -> None:
    """Give nodes of one name names of their own: rewriters reuse names, and ONNX Runtime refuses that."""
    taken = {node.name for node in model.graph.all_nodes() if node.name}
    seen: set[str] = set()
    for node in model.graph.all_nodes():
        if not node.name:
            continue
        if node.name in seen:
            number = next(n for n in count(1) if f"{node.name}_{n}" not in taken)
            node.name = f"{node.name}_{number}"
            taken.add(node.name)
        seen.add(node.name)


def _measure(step: Pass, model: ir.Model, context: PassContext) -> tuple[float, float]:
    outputs = _named(step, lambda: context.run(model))
    differences = checks.compare(context.expected or [], outputs)
    context.rms_bound = bound = max(context.rms_bound, step.rms_bound)
    for difference in differences:
        if difference.same_special and difference.rms_relative <= bound:
            continue
        error = f"RMS relative error {difference.rms_relative:.3g}, bound {bound:g}"
        what = error if difference.same_special else "NaN, infinities, shape or exact values differ"
        raise InternalError(
            f"the graph pass {step.name!r} changed what the model computes",
            f"output {difference.output!r}: {what}",
            _REMEDY,
        )
    return max(d.max_abs for d in differences), max(d.rms_relative for d in differences)


def _named(step: Pass, check: Callable[[], Any]) -> Any:
    """`check()`, with the pass's name put in front of its error."""
    try:
        return check()
    except InternalError as error:
        raise InternalError(f"after the graph pass {step.name!r}: {error.what}", error.value, _REMEDY) from error
