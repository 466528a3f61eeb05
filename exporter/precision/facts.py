"""What precision rules look at, and what they answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from exporter.artifact import InputContract
from exporter.precision.constants import ConstantStats, measure_constant
from exporter.precision.ranges import MARGIN, Range
from exporter.precision.schemas import Blocked, HalfType, Slots, half_slots, has_subgraphs, is_float, touches_float

if TYPE_CHECKING:
    import onnx_ir as ir

Measured = dict[int, tuple[Any, ConstantStats]]
"""What was measured about tensors, by identity; each tensor is held, so that its identity stays its own."""


@dataclass(frozen=True)
class Decision:
    """A node that stays in FP32, and why (or, with `keep` half, that it need not).

    Attributes:
        node: Its name.
        op: Its operator.
        rule: Name of the rule that says so.
        why: One clause for a reader.
        figures: What the rule measured or compared, with units in the keys.
        keep: ``"fp32"``, or ``"half"`` where data show that what the rule fears does not happen.
    """

    node: str
    op: str
    rule: str
    why: str
    figures: dict[str, Any] = field(default_factory=dict)
    keep: str = "fp32"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ConstantChange:
    """A constant whose values beyond the half type's range are clamped to its largest finite ones, and why."""

    constant: str
    rule: str
    why: str
    figures: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Facts:
    """A graph as rules see it, and what they have decided so far.

    Node names are unique over all its graphs. `kept` fills as rules run: later rules build on earlier ones. `cleared`
    has the nodes that a rule would keep without data; another rule may keep them all the same.
    """

    def __init__(
        self,
        model: ir.Model,
        half: HalfType,
        contract: InputContract,
        *,
        ranges: Mapping[str, Range] | None = None,
        margin: float = MARGIN,
        keep: Sequence[str] = (),
        io_half: bool = False,
        opset: int | None = None,
        stats: Measured | None = None,
    ) -> None:
        """Args:
        model: The FP32 graph, every value typed.
        half: The type to convert to.
        contract: What callers promise about the inputs.
        ranges: Measured ranges by value name.
        margin: Measured ranges are multiplied by it before they are compared with the half type's.
        keep: Names of nodes that the caller wants in FP32.
        io_half: Whether float inputs and outputs of the model become half.
        opset: Look at operators as this opset defines them; ``None`` for the model's own.
        stats: Filled with what was measured about constants; give one to several `Facts` to measure once.
        """
        self.model = model
        self.half = half
        self.contract = contract
        self.ranges: Mapping[str, Range] = ranges or {}
        self.margin = margin
        self.asked = tuple(keep)
        self.io_half = io_half
        self.kept: dict[str, Decision] = {}
        self.changes: dict[str, ConstantChange] = {}
        self.cleared: dict[str, Decision] = {}
        self.nodes: list[ir.Node] = list(model.graph.all_nodes())
        self.opsets: dict[str, int] = dict(model.graph.opset_imports)
        if opset is not None:
            self.opsets[""] = opset
        self._stats = {} if stats is None else stats
        self._slots: dict[ir.Node, Slots | Blocked] = {}
        self._explained: dict[ir.Value, set[str]] | None = None

    def slots(self, node: ir.Node) -> Slots | Blocked:
        """The types of a node in half, or why it has none."""
        if node not in self._slots:
            self._slots[node] = half_slots(node, self.opsets, self.half)
        return self._slots[node]

    def open_nodes(self) -> Iterator[ir.Node]:
        """Nodes that compute on floats, whose types can change, and that no rule has kept yet, in graph order."""
        for node in self.nodes:
            if node.name not in self.kept and self.decidable(node):
                yield node

    def decidable(self, node: ir.Node) -> bool:
        """Whether the node has a precision of its own: control flow, casts, and mere readers of a type have none."""
        return touches_float(node) and not has_subgraphs(node) and not is_cast(node) and not self.follows(node)

    def follows(self, node: ir.Node) -> bool:
        """Whether the node takes its one float input in whatever type it comes (`Shape`, `IsNaN`, `ArgMax` …)."""
        floats = [v for v in node.inputs if is_float(v)]
        if len(floats) != 1 or any(is_float(v) for v in node.outputs) or has_subgraphs(node):
            return False
        slots = self.slots(node)
        return isinstance(slots, Slots) and self.half.onnx_type in slots.inputs

    def becomes_half(self, node: ir.Node) -> Slots | None:
        """The node's types if no rule has kept it in FP32."""
        if not self.decidable(node) or self.is_kept(node):
            return None
        slots = self.slots(node)
        return slots if isinstance(slots, Slots) else None

    def stats(self, value: ir.Value) -> ConstantStats:
        """What the constant `value` loses in half precision."""
        tensor = value.const_value
        if tensor is None:
            raise ValueError(f"{value.name!r} is no constant")
        if id(tensor) not in self._stats:
            self._stats[id(tensor)] = (tensor, measure_constant(tensor.numpy(), self.half))
        return self._stats[id(tensor)][1]

    def measured(self, value: ir.Value | None) -> Range | None:
        """What was measured of a computed value; ``None`` where nothing was."""
        return None if value is None or constant(value) else self.ranges.get(str(value.name))

    def largest(self, value: ir.Value | None) -> float | None:
        """The largest measured magnitude of a value, apart from what a mask puts into it; ``None``: not measured."""
        from exporter.precision.trails import explained_sides

        found = self.measured(value)
        if found is None or value is None:
            return None
        if self._explained is None:
            self._explained = explained_sides(self)
        sides = [s for s in ("low", "high") if s not in self._explained.get(value, ())]
        if sides == ["low", "high"]:
            return found.largest
        return max((abs(getattr(found, side)) for side in sides), default=0.0)

    def is_kept(self, node: ir.Node) -> bool:
        return node.name in self.kept

    def add(self, found: Decision | ConstantChange) -> None:
        """Record what a rule found; a node's first decision to keep it stands."""
        if isinstance(found, ConstantChange):
            self.changes.setdefault(found.constant, found)
        elif found.keep != "fp32":
            self.cleared.setdefault(found.node, found)
        else:
            self.kept.setdefault(found.node, found)


Rule = Callable[[Facts], Iterable[Decision | ConstantChange]]


def is_cast(node: ir.Node) -> bool:
    """Whether the node only changes an element type."""
    return node.op_type == "Cast" and node.domain in ("", "ai.onnx")


def constant(value: ir.Value | None) -> bool:
    """Whether `value` is an initializer that no caller can override."""
    return value is not None and value.const_value is not None and not value.is_graph_input()


def float_inputs(node: ir.Node) -> list[ir.Value]:
    """The node's float32 inputs, without those left out."""
    return [v for v in node.inputs if v is not None and is_float(v)]


def float_outputs(node: ir.Node) -> list[ir.Value]:
    """The node's float32 outputs."""
    return [v for v in node.outputs if is_float(v)]


def consumers(node: ir.Node) -> list[ir.Node]:
    """The nodes that read one of the node's float32 outputs, in graph order, subgraphs' nodes included."""
    return list(dict.fromkeys(use.node for value in float_outputs(node) for use in value.uses()))


def clear(node: ir.Node, rule: str, why: str, **figures: Any) -> Decision:
    """That data show a node to be harmless, which `rule` keeps in FP32 without data."""
    return Decision(str(node.name), node.op_type, rule, why, figures, keep="half")


def decide(node: ir.Node, rule: str, why: str, **figures: Any) -> Decision:
    """A decision about `node`."""
    return Decision(str(node.name), node.op_type, rule, why, figures)
