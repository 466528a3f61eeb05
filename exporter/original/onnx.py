"""An ONNX file as the original: run by ONNX Runtime on the CPU in the precision it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from exporter.artifact import Axis, InputContract, Signature, TensorSpec
from exporter.errors import RequestError, first_line, missing_package
from exporter.original.base import DEFAULT_MAX_LENGTH, NO_LIMIT, POSITION_KEYS, Original
from exporter.sources.source import Source
from exporter.tasks.registry import Task

# Names under which exporters write the two axes that Planish knows, the surest first.
_AXIS_NAMES = {
    "batch_size": "batch",
    "batch": "batch",
    "N": "batch",
    "sequence_length": "sequence",
    "sequence": "sequence",
    "seq_len": "sequence",
    "seq_length": "sequence",
    "encoder_sequence_length": "sequence",
}


@dataclass
class OnnxOriginal(Original):
    """An ONNX model and the session that runs it."""

    session: Any = field(default=None, repr=False)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [spec.name for spec in self.signature.outputs]
        feeds = {spec.name: np.ascontiguousarray(inputs[spec.name]) for spec in self.signature.inputs}
        try:
            return dict(zip(names, self.session.run(names, feeds), strict=True))
        except Exception as error:  # ONNX Runtime has no common base class for its errors
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
            raise RequestError(
                f"the ONNX model does not run with inputs of the shapes {shapes}",
                first_line(error),
                "Where it takes no batches so large or sequences so long, set export.max_batch or export.max_length",
            ) from error


def open_onnx(
    source: Source,
    task: Task,
    *,
    max_batch: int,
    max_length: int | None,
    attends: bool,
    custom: Mapping[str, Any] | None,
) -> OnnxOriginal:
    """Open the model with ONNX Runtime, without its graph optimizations: what the file says is what is run.

    Raises:
        RequestError: ONNX Runtime cannot open it, or its declared axes do not fit.
        EnvironmentLackError: ONNX Runtime is not installed.
    """
    import onnx

    try:
        import onnxruntime
    except ImportError as error:
        raise missing_package("onnxruntime", "cpu") from error
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(source.path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exception classes differ by version
        raise RequestError("ONNX Runtime cannot open the model", first_line(error), f"Check {source.path}") from error
    graph = onnx.load(str(source.path), load_external_data=False).graph
    signature = _signature(graph, max_batch, _length_limit(source, max_length), custom)
    signature = _with_ranks(signature, graph, session)
    if task.outputs and not set(task.outputs) & {spec.name for spec in signature.outputs}:
        names = ", ".join(spec.name for spec in signature.outputs)
        raise RequestError(
            f"the ONNX model has no output of {task.name}", names, f"It would be called {' or '.join(task.outputs)}"
        )
    modality = "tensor" if task.name == "custom" else task.modality
    if modality != "tensor" and source.files_folder is None:
        raise RequestError(
            f"for {task.name} an ONNX model needs its configuration and tokenizer beside it",
            source.path,
            "Put config.json and the tokenizer's files into its folder, or leave the task out and give it tensors",
        )
    return OnnxOriginal(
        source=source,
        task=task,
        module=None,
        signature=signature,
        contract=_contract(graph, signature, attends),
        example=_example(signature),
        modality=modality,
        encoder_folder=source.files_folder if modality != "tensor" else None,
        session=session,
    )


def _length_limit(source: Source, wanted: int | None) -> int:
    """The longest sequence: as asked for, or as the configuration beside the file has it."""
    if wanted is not None:
        return wanted
    config, tokenizer = source.json("config.json") or {}, source.json("tokenizer_config.json") or {}
    values = [*(config.get(key) for key in POSITION_KEYS), tokenizer.get("model_max_length")]
    return min((int(v) for v in values if isinstance(v, int | float) and 0 < v < NO_LIMIT), default=DEFAULT_MAX_LENGTH)


def _signature(graph: Any, max_batch: int, max_length: int, custom: Mapping[str, Any] | None) -> Signature:
    """The graph's inputs and outputs; axes that the graph names without a range get the limits asked for."""
    import onnx

    initializers = {tensor.name for tensor in graph.initializer}
    fed = [value for value in graph.input if value.name not in initializers]
    names = _axis_names({dim.dim_param for value in fed for dim in value.type.tensor_type.shape.dim})
    axes: dict[str, Axis] = {}

    def axis_name(symbol: str, place: str, *, declares: bool) -> str:
        if symbol in names:
            return names[symbol]
        # A symbol of the outputs alone is no axis of the inputs, whatever it is called.
        return symbol if symbol and (declares or symbol not in axes) else place

    def spec(value: Any, *, declares: bool) -> TensorSpec:
        tensor = value.type.tensor_type
        if not value.type.HasField("tensor_type"):
            raise RequestError("the ONNX model has an input or output that is no tensor", value.name)
        if declares and not tensor.HasField("shape"):
            raise RequestError("an input of the ONNX model declares no shape", value.name, "Export it with one")
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        shape: list[int | str] = []
        for index, dim in enumerate(tensor.shape.dim):
            if dim.HasField("dim_value"):
                shape.append(int(dim.dim_value))
                continue
            name = axis_name(dim.dim_param, f"{value.name}_{index}", declares=declares)
            shape.append(name)
            if declares and name not in axes:
                high = max_batch if name == "batch" or index == 0 else max_length
                axes[name] = Axis(name, 1, high)
        return TensorSpec(value.name, dtype, tuple(shape))

    inputs = tuple(spec(value, declares=True) for value in fed)
    outputs = tuple(spec(value, declares=False) for value in graph.output)
    for name, item in ((custom or {}).get("axes") or {}).items():
        if name not in axes:
            raise RequestError("the ONNX model has no such axis", name, f"It has: {', '.join(axes) or 'none'}")
        axes[name] = Axis(name, int(item["min"]), int(item["max"]))
    return Signature(inputs, outputs, tuple(axes.values()))


def _axis_names(symbols: set[str]) -> dict[str, str]:
    """The names of the inputs' axes by the graph's symbols. Two symbols never get one name: they are two lengths."""
    names = {symbol: symbol for symbol in symbols if symbol}
    for symbol, name in _AXIS_NAMES.items():
        if symbol in symbols and name not in names.values():
            names[symbol] = name
    return names


def _with_ranks(signature: Signature, graph: Any, session: Any) -> Signature:
    """`signature` with the ranks of outputs that declare no shape, as they come out; all their lengths are free."""
    unknown = [value.name for value in graph.output if not value.type.tensor_type.HasField("shape")]
    if not unknown:
        return signature
    try:
        found = session.run(unknown, {name: value.numpy() for name, value in _example(signature).items()})
    except Exception as error:  # ONNX Runtime has no common base class for its errors
        raise RequestError(
            "an output of the ONNX model declares no shape, and the model does not run on plain inputs",
            f"{unknown[0]}: {first_line(error)}",
            "Export it with shapes",
        ) from error
    ranks = dict(zip(unknown, (array.ndim for array in found), strict=True))
    outputs = (
        replace(spec, shape=tuple(f"{spec.name}_{index}" for index in range(ranks[spec.name])))
        if spec.name in ranks
        else spec
        for spec in signature.outputs
    )
    return replace(signature, outputs=tuple(outputs))


def _contract(graph: Any, signature: Signature, attends: bool) -> InputContract:
    """What callers promise: masks of 0 and 1, and ids that the tables which they look up have rows for."""
    names = {spec.name for spec in signature.inputs}
    mask = "attention_mask" if "attention_mask" in names else None
    ranges = {mask: (0, 1)} if mask else {}
    rows = {tensor.name: tensor.dims[0] for tensor in graph.initializer if tensor.dims}
    for node in graph.node:
        along = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        if node.op_type == "Gather" and along == 0 and node.input[0] in rows and node.input[1] in names:
            low, high = ranges.get(node.input[1], (0, rows[node.input[0]] - 1))
            ranges[node.input[1]] = (low, min(high, rows[node.input[0]] - 1))
    return InputContract(attends=attends and mask is not None, mask=mask, id_ranges=ranges)


def _example(signature: Signature) -> dict[str, Any]:
    """Zeros and ones that every model accepts: id 0, an attention mask of ones, small random numbers."""
    import torch

    lengths = {axis.name: min(max(2 if axis.name == "batch" else 16, axis.min), axis.max) for axis in signature.axes}
    generator = torch.Generator().manual_seed(0)
    example = {}
    for spec in signature.inputs:
        shape = [dim if isinstance(dim, int) else lengths[dim] for dim in spec.shape]
        dtype = getattr(torch, spec.dtype)
        if dtype.is_floating_point:
            example[spec.name] = torch.randn(shape, generator=generator).to(dtype)
        else:
            example[spec.name] = torch.full(shape, 1 if "mask" in spec.name else 0, dtype=dtype)
    return example
