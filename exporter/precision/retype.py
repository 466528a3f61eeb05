"""Gives every operator of a graph its decided float type and inserts casts where types meet: one per value and type."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from exporter.precision.constants import half_tensor
from exporter.precision.facts import Facts, constant, is_cast
from exporter.precision.schemas import FLOAT, is_float, type_attribute

if TYPE_CHECKING:
    import onnx_ir as ir

TWICE_LIMIT_BYTES = 64 * 1024
"""A constant that both halves of a graph read is stored in both types up to this size (in FP32). A larger one is
stored in half only, and the FP32 readers cast it: the file stays small, and all readers see the same weight."""


@dataclass
class Retyped:
    """What `retype` did.

    Attributes:
        converted: Names of nodes that now compute in half.
        casts: Names of the casts inserted.
        casts_removed: Casts of the original graph that became superfluous.
        constants_half: Constants stored in half precision.
        constants_fp32: Float constants left in FP32.
        constants_twice: Small constants stored in both types.
        constants_cast: Large constants stored in half that FP32 readers cast.
        softmax_inside: Names of half `Attention` operators that were told to compute their softmax in FP32.
    """

    converted: list[str] = field(default_factory=list)
    casts: list[str] = field(default_factory=list)
    casts_removed: int = 0
    constants_half: int = 0
    constants_fp32: int = 0
    constants_twice: list[str] = field(default_factory=list)
    constants_cast: list[str] = field(default_factory=list)
    softmax_inside: list[str] = field(default_factory=list)


def retype(facts: Facts) -> Retyped:
    """Retype the graph of `facts` in place, after the rules have run."""
    return _Retyping(facts).run()


class _Retyping:
    """One run over one graph: `wanted` fixes the type of every float input before anything is changed."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.half = facts.half.onnx_type
        self.result = Retyped()
        self.native: dict[ir.Value, int] = {}
        self.available: dict[tuple[ir.Value, int], ir.Value] = {}
        self.taken = {v.name for g in facts.model.graphs() for v in (*g.inputs, *g.initializers.values())}
        self.taken |= {v.name for node in facts.nodes for v in node.outputs}
        self.taken |= {node.name for node in facts.nodes}
        self.graphs: list[ir.Graph] = list(facts.model.graphs())
        self.main = facts.model.graph

    def run(self) -> Retyped:
        floats = self._native_types()
        reads: list[tuple[ir.Node, int, int]] = []
        for node in self.facts.nodes:
            wanted = self._wanted(node)
            reads.extend((node, i, t) for i, t in enumerate(wanted) if t is not None)
        self._constants(reads)
        for node in self.facts.nodes:
            self._apply(node)
        for value, onnx_type in self.native.items():
            self._set_type(value, onnx_type)
        for node, index, onnx_type in reads:
            value = node.inputs[index]
            assert value is not None
            node.replace_input_with(index, self._as(value, onnx_type))
        for graph in self.graphs:
            self._outputs(graph, floats)
        self._drop_casts()
        return self.result

    def _native_types(self) -> set[ir.Value]:
        """The type that every float value has where it is made; also returns all float values."""
        floats: set[ir.Value] = set()
        for graph in self.graphs:
            border = self.half if self.facts.io_half and graph is self.main else FLOAT
            for value in graph.inputs:
                if is_float(value):
                    self.native[value] = border
            floats.update(v for v in graph.initializers.values() if is_float(v))
        for node in self.facts.nodes:
            slots = self.facts.becomes_half(node)
            for index, value in enumerate(node.outputs):
                if is_float(value):
                    onnx_type = slots.outputs[index] if slots is not None else FLOAT
                    self.native[value] = onnx_type or FLOAT
        floats.update(self.native)
        return floats

    def _wanted(self, node: ir.Node) -> list[int | None]:
        """The type that the node wants at each input; ``None`` where it takes what comes."""
        if is_cast(node) or self.facts.follows(node):
            return [None] * len(node.inputs)
        slots = self.facts.becomes_half(node)
        if slots is not None:
            return list(slots.inputs)
        return [FLOAT if is_float(v) else None for v in node.inputs]

    def _constants(self, reads: list[tuple[ir.Node, int, int]]) -> None:
        wanted: dict[ir.Value, set[int]] = {}
        for node, index, onnx_type in reads:
            value = node.inputs[index]
            if value is not None and constant(value):
                wanted.setdefault(value, set()).add(onnx_type)
        for graph in self.graphs:
            for value in list(graph.initializers.values()):
                if not is_float(value) or not constant(value):
                    continue
                types = wanted.get(value, set())
                if value.is_graph_output() or self.half not in types:
                    self.native[value] = FLOAT
                    self.result.constants_fp32 += 1
                    if self.half in types:
                        self._twice(graph, value)
                elif types == {self.half} or value.const_value.nbytes > TWICE_LIMIT_BYTES:
                    if FLOAT in types:
                        self.result.constants_cast.append(value.name)
                    value.const_value = half_tensor(value.const_value, self.facts.half, value.name)
                    self.native[value] = self.half
                    self.result.constants_half += 1
                else:
                    self.native[value] = FLOAT
                    self.result.constants_twice.append(value.name)
                    self._twice(graph, value)

    def _twice(self, graph: ir.Graph, value: ir.Value) -> None:
        """Store a second copy of a constant, in half."""
        import onnx_ir as ir

        name = self._free(f"{value.name}_{self.facts.half.name}")
        copy = ir.Value(name=name, shape=value.shape, type=ir.TensorType(ir.DataType(self.half)))
        copy.const_value = half_tensor(value.const_value, self.facts.half, name)
        graph.register_initializer(copy)
        self.available[value, self.half] = copy

    def _apply(self, node: ir.Node) -> None:
        """Set the attributes that fix a half node's output type."""
        import onnx_ir as ir

        if self.facts.becomes_half(node) is None:
            return
        self.result.converted.append(str(node.name))
        if node.op_type == "Attention" and node.domain == "" and "softmax_precision" not in node.attributes:
            node.attributes["softmax_precision"] = ir.AttrInt64("softmax_precision", FLOAT)
            self.result.softmax_inside.append(str(node.name))
        name = type_attribute(node)
        if name == "value":
            tensor = half_tensor(node.attributes[name].as_tensor(), self.facts.half, "value")
            node.attributes[name] = ir.AttrTensor(name, ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name="value"))
        elif name is not None:
            node.attributes[name] = ir.AttrInt64(name, self.half)

    def _as(self, value: ir.Value, onnx_type: int) -> ir.Value:
        """`value` in the given type: itself, or the one cast that all its readers share."""
        native = self.native.get(value)
        if native is None or native == onnx_type:
            return value
        key = (value, onnx_type)
        if key not in self.available:
            source = value
            producer = value.producer()
            # A value that is itself a cast is cast again from its own source, so that casts never form a chain.
            if producer is not None and is_cast(producer) and producer.inputs[0] is not None:
                source = producer.inputs[0]
            if source.dtype is not None and int(source.dtype) == onnx_type:
                self.available[key] = source
            else:
                self.available[key] = self._cast(source, value, onnx_type)
        return self.available[key]

    def _cast(self, source: ir.Value, after: ir.Value, onnx_type: int) -> ir.Value:
        """A cast of `source`, right behind the node that makes `after`."""
        import onnx_ir as ir

        suffix = "fp32" if onnx_type == FLOAT else self.facts.half.name
        name = self._free(f"{after.name}_{suffix}")
        node = ir.node("Cast", [source], {"to": onnx_type}, name=self._free(f"{name}/Cast"))
        output = node.outputs[0]
        output.name, output.shape, output.dtype = name, after.shape, ir.DataType(onnx_type)
        producer = after.producer()
        if producer is not None and producer.graph is not None:
            producer.graph.insert_after(producer, node)
        else:
            graph = after.graph
            if graph is None or not len(graph):
                raise ValueError(f"{after.name!r} belongs to no graph with nodes")
            graph.insert_before(graph[0], node)
        self.result.casts.append(str(node.name))
        return output

    def _outputs(self, graph: ir.Graph, floats: set[ir.Value]) -> None:
        """Give a graph's outputs the type that its border has, under their own names."""
        border = self.half if self.facts.io_half and graph is self.main else FLOAT
        renamed: set[ir.Value] = set()
        for index, value in enumerate(graph.outputs):
            if value not in floats or self.native.get(value, border) == border:
                continue
            converted = self._as(value, border)
            if graph is self.main and value not in renamed:
                if converted.is_graph_input() or converted.is_graph_output():
                    converted = self._cast(value, value, border)
                suffix = self.facts.half.name if border == FLOAT else "fp32"
                renamed.add(value)
                value.name, converted.name = self._free(f"{value.name}_{suffix}"), value.name
            graph.outputs[index] = converted

    def _drop_casts(self) -> None:
        """Remove casts to the type that their input has, and casts that nobody reads any more."""
        for node in self.facts.nodes:
            if not is_cast(node) or node.graph is None:
                continue
            source, output = node.inputs[0], node.outputs[0]
            same = source is not None and source.dtype is not None and source.dtype == output.dtype
            if same and source is not None and not output.is_graph_output():
                output.replace_all_uses_with(source)
            if not output.uses() and not output.is_graph_output():
                node.graph.remove(node, safe=True)
                self.result.casts_removed += 1

    def _set_type(self, value: ir.Value, onnx_type: int) -> None:
        import onnx_ir as ir

        value.dtype = ir.DataType(onnx_type)

    def _free(self, name: str) -> str:
        candidate, number = name, 0
        while candidate in self.taken:
            number += 1
            candidate = f"{name}_{number}"
        self.taken.add(candidate)
        return candidate
