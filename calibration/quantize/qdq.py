"""Static int8 and FP8 as explicit Q/DQ pairs around the products of an ONNX graph: what OpenVINO and TensorRT fuse.

Which operators, which types and which ranges: that is a `Scheme`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from calibration.observers import Method, choose_range
from calibration.quantize.packed import write_apart
from calibration.quantize.products import (
    Kept,
    is_activation,
    output_axis,
    products,
    refuse_nothing,
    refuse_unknown,
    save_quantized,
    weight_of,
)
from calibration.quantize.tables import quantize_tables
from calibration.quantize.weights import DTYPES, LARGEST, SMALLEST_SCALE, Numbers, quantize_weight
from calibration.table import CalibrationTable
from exporter.errors import NotApplicableError

if TYPE_CHECKING:
    import onnx_ir as ir

Array = np.ndarray
FP8_OPSET, FP8_IR_VERSION = 19, 9
"""The versions of ONNX's operators and of its format from which on there is FP8."""


@dataclass(frozen=True)
class Scheme:
    """How a target wants its Q/DQ pairs.

    Attributes:
        activations: ``uint8`` (asymmetric: a zero point of its own), ``int8`` (symmetric, as TensorRT demands) or
            ``fp8`` (E4M3, symmetric; the weights then too, which are int8 otherwise).
        method: How ranges are chosen (`calibration.observers.choose_range`). FP8 takes the largest magnitude: its
            steps grow with the values, so clipping gains nothing.
        attention: Quantize products of two activations (scores, and probabilities by values) too.
        bias_correction: Take the mean error of the weights' rounding off the bias that follows.
        tables: Store large embedding tables as int8 too (`calibration.quantize.tables`).
    """

    activations: Literal["uint8", "int8", "fp8"] = "uint8"
    method: Method = "minmax"
    attention: bool = True
    bias_correction: bool = True
    tables: bool = False

    @property
    def weights(self) -> Numbers:
        return "fp8" if self.activations == "fp8" else "int8"


SCHEMES = {
    # Attention itself stays as it is: OpenVINO fuses it whole, and is slower where its products are quantized.
    "openvino-cpu": Scheme("uint8", "mse", attention=False, tables=True),
    "tensorrt": Scheme("int8", "mse", attention=True),
    "tensorrt-fp8": Scheme("fp8", "minmax", attention=True),
}


def quantize_static(
    path_in: Path,
    path_out: Path,
    table: CalibrationTable,
    scheme: Scheme,
    *,
    keep: Collection[str] = (),
    external_data: bool | None = None,
) -> dict[str, Any]:
    """Put Q/DQ pairs around the products of a graph.

    Args:
        path_in: The FP32 graph that `table` was made of.
        path_out: Where the quantized graph goes.
        table: Ranges of the activations.
        scheme: What the target fuses.
        keep: Names of nodes that stay in FP32.
        external_data: As `exporter.onnx_files.save_model` has it.

    Returns:
        The record: the scheme, ``quantized`` (node, weight error, ranges of the activations), ``tables``, and ``kept``
        (and why).

    Raises:
        RequestError: `keep` names no product of the graph, or the table lacks a tensor.
        NotApplicableError: Nothing could be quantized, or the graph's operators are older than FP8.
    """
    from exporter.onnx_files import load_model

    model = load_model(path_in)
    if scheme.activations == "fp8":
        _allow_fp8(model)
    found = products(model, attention=scheme.attention)
    refuse_unknown(model, keep)
    writer = _Writer(model, table, scheme)
    kept: list[Kept] = []
    quantized: list[dict[str, Any]] = []
    done: list[ir.Node] = []
    for node in found:
        if node.name in keep:
            kept.append(Kept(str(node.name), node.op_type, "asked", "asked for by name"))
        elif refused := writer.refusal(node):
            kept.append(refused)
        else:
            quantized.append(writer.quantize(node))
            done.append(node)
    refuse_nothing(quantized, kept, path_in)
    if scheme.activations != "uint8":
        write_apart(model, done)
    stored, floats = quantize_tables(model, keep=keep) if scheme.tables else ([], [])
    save_quantized(model, path_out, external_data)
    return {
        "scheme": asdict(scheme),
        "quantized": quantized,
        "tables": stored,
        "kept": [asdict(entry) for entry in (*kept, *floats)],
    }


def _allow_fp8(model: ir.Model) -> None:
    """Raise the format's version to one that has FP8, and refuse operators that don't."""
    opset = model.opset_imports.get("", 0)
    if opset < FP8_OPSET:
        remedy = f"Export it with export.opset={FP8_OPSET} or later, or leave fp8 out"
        raise NotApplicableError("the graph's operators are older than FP8", f"opset {opset}", remedy)
    model.ir_version = max(model.ir_version, FP8_IR_VERSION)


class _Writer:
    """Writes the pairs into one graph; a tensor that several products read gets one pair."""

    def __init__(self, model: ir.Model, table: CalibrationTable, scheme: Scheme) -> None:
        self.model, self.table, self.scheme = model, table, scheme
        self._pairs: dict[int, ir.Value] = {}
        self._ranges: dict[str, tuple[float, float]] = {}

    def refusal(self, node: ir.Node) -> Kept | None:
        """Why a product cannot be quantized; ``None`` where it can."""
        if node.op_type == "Conv" and self.scheme.activations == "fp8":
            return Kept(str(node.name), node.op_type, "no_fp8_form", "only matrix products have an FP8 form")
        for value in node.inputs[:2]:
            if value is None or not is_activation(value):
                continue
            statistics = self.table.of(str(value.name))
            if statistics.constant:
                reason = f"its input {value.name!r} never changed in calibration: no range can be learned"
                return Kept(str(node.name), node.op_type, "constant_input", reason)
        return None

    def quantize(self, node: ir.Node) -> dict[str, Any]:
        entry: dict[str, Any] = {"node": str(node.name), "op": node.op_type, "activations": {}}
        left, right = node.inputs[0], node.inputs[1]
        for index, value in enumerate((left, right)):
            if value is not None and is_activation(value):
                entry["activations"][str(value.name)] = list(self._range(value))
                node.replace_input_with(index, self._pair(node, value))
        weight = weight_of(node)
        if weight is not None and left is not None:
            entry["weight_rms_relative"] = self._weight(node, left, weight)
        return entry

    def _range(self, value: ir.Value) -> tuple[float, float]:
        name = str(value.name)
        if name not in self._ranges:
            statistics = self.table.of(name)
            symmetric = self.scheme.activations != "uint8"
            if statistics.histogram is None or self.scheme.activations == "fp8":
                low, high = min(statistics.min, 0.0), max(statistics.max, 0.0)
                bound = max(-low, high)
                self._ranges[name] = (-bound, bound) if symmetric else (low, high)
            else:
                low, high = choose_range(statistics.histogram, self.scheme.method, symmetric=symmetric)
                self._ranges[name] = (float(low), float(high))
        return self._ranges[name]

    def _pair(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """The value after `QuantizeLinear` and `DequantizeLinear`."""
        from exporter.passes.graphs import add_constant, add_node

        if id(value) in self._pairs:
            return self._pairs[id(value)]
        low, high = self._range(value)
        kind = self.scheme.activations
        step = (high - low) / 255 if kind == "uint8" else high / LARGEST[kind]
        scale = np.float32(max(step, float(SMALLEST_SCALE)))
        zero = np.clip(np.round(-low / scale), 0, 255).astype(np.uint8) if kind == "uint8" else DTYPES[kind].type(0)
        graph = self.model.graph
        step = add_constant(graph, np.asarray(scale), f"{value.name}_scale")
        point = add_constant(graph, np.asarray(zero), f"{value.name}_zero_point")
        # Products come in the order of the graph: what reads the pair later stands behind it.
        integers = add_node(node, "QuantizeLinear", [value, step, point])
        integers.name = f"{value.name}_quantized"
        restored = add_node(node, "DequantizeLinear", [integers, step, point], like=value)
        restored.name = f"{value.name}_restored"
        self._pairs[id(value)] = restored
        return restored

    def _weight(self, node: ir.Node, activation: ir.Value, weight: ir.Value) -> float:
        """Replace a weight by its numbers of 8 bits; returns the RMS relative error of its rounding."""
        from exporter.passes.graphs import add_constant, add_node

        assert weight.const_value is not None
        array = weight.const_value.numpy()
        axis = output_axis(node)
        made = quantize_weight(array, axis, self.scheme.weights)
        graph = self.model.graph
        integers = add_constant(graph, made.values, f"{weight.name}_quantized")
        scales = add_constant(graph, made.scales, f"{weight.name}_scale")
        zeros = add_constant(graph, np.zeros(made.scales.shape, made.values.dtype), f"{weight.name}_zero_point")
        restored = add_node(node, "DequantizeLinear", [integers, scales, zeros], like=weight, axis=axis)
        node.replace_input_with(1, restored)
        if self.scheme.bias_correction and node.op_type != "Conv":  # whose channels are not those of the table
            lost = array - made.restored()
            _correct_bias(self.model, node, self.table, activation, lost if axis else lost.T)
        return made.rms_relative


def _correct_bias(model: ir.Model, node: ir.Node, table: CalibrationTable, activation: ir.Value, lost: Array) -> None:
    """Add to the bias after a product what the rounding of its weights takes off the mean output.

    With inputs of mean `m`, rounded weights give outputs whose mean differs by `m @ lost` (M. Nagel et al., "Data-Free
    Quantization Through Weight Equalization and Bias Correction", 2019, section 4.2, with the mean measured).
    """
    from exporter.passes.graphs import add_constant

    mean = table.of(str(activation.name)).channel_mean
    if len(mean) != len(lost):
        return
    shift = (mean @ lost).astype(np.float32)
    place = bias_of(node)
    if place is None:
        return
    reader, index = place
    bias = reader.inputs[index]
    assert bias is not None
    assert bias.const_value is not None
    corrected = add_constant(model.graph, bias.const_value.numpy() + shift, f"{bias.name}_corrected")
    reader.replace_input_with(index, corrected)


def bias_of(node: ir.Node) -> tuple[ir.Node, int] | None:
    """Where the constant bias of a product is read: the node and its input; ``None`` where there is none."""
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        return (node, 2) if node.inputs[2].const_value is not None else None
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add":
        return None
    reader, index = uses[0].node, 1 - uses[0].idx
    bias = reader.inputs[index]
    if bias is None or bias.const_value is None or len(bias.const_value.shape) != 1:
        return None
    return reader, index
