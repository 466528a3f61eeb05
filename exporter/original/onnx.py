"""An ONNX file as the original: run by ONNX Runtime on the CPU in the precision it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from exporter.artifact import Axis, InputContract, Signature, TensorSpec
from exporter.errors import RequestError, missing_package
from exporter.original.base import DEFAULT_MAX_LENGTH, Original
from exporter.sources.source import Source
from exporter.tasks.registry import Task

# Names under which exporters write the two axes that Planish knows.
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
        return dict(zip(names, self.session.run(names, feeds), strict=True))


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
        line = str(error).strip().splitlines()[0][:300]
        raise RequestError("ONNX Runtime cannot open the model", line, f"Check {source.path}") from error
    signature = _signature(source, max_batch, max_length, custom)
    folder = _encoder_folder(source)
    modality = "tensor" if task.name == "custom" else task.modality
    return OnnxOriginal(
        source=source,
        task=task,
        module=None,
        signature=signature,
        contract=_contract(signature, attends),
        example=_example(signature),
        modality=modality,
        encoder_folder=folder if modality != "tensor" else None,
        session=session,
    )


def _signature(source: Source, max_batch: int, max_length: int | None, custom: Mapping[str, Any] | None) -> Signature:
    """The graph's inputs and outputs; axes that the graph names without a range get the limits asked for."""
    import onnx

    graph = onnx.load(str(source.path), load_external_data=False).graph
    initializers = {tensor.name for tensor in graph.initializer}
    axes: dict[str, Axis] = {}

    def spec(value: Any, *, declares: bool) -> TensorSpec:
        tensor = value.type.tensor_type
        if not value.type.HasField("tensor_type"):
            raise RequestError("the ONNX model has an input or output that is no tensor", value.name)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        shape: list[int | str] = []
        for index, dim in enumerate(tensor.shape.dim):
            if dim.HasField("dim_value"):
                shape.append(int(dim.dim_value))
                continue
            name = _AXIS_NAMES.get(dim.dim_param, dim.dim_param) or f"{value.name}_{index}"
            shape.append(name)
            if declares and name not in axes:
                high = max_batch if name == "batch" or index == 0 else (max_length or DEFAULT_MAX_LENGTH)
                axes[name] = Axis(name, 1, high)
        return TensorSpec(value.name, dtype, tuple(shape))

    inputs = tuple(spec(value, declares=True) for value in graph.input if value.name not in initializers)
    outputs = tuple(spec(value, declares=False) for value in graph.output)
    for name, item in ((custom or {}).get("axes") or {}).items():
        if name not in axes:
            raise RequestError("the ONNX model has no such axis", name, f"It has: {', '.join(axes) or 'none'}")
        axes[name] = Axis(name, int(item["min"]), int(item["max"]))
    return Signature(inputs, outputs, tuple(axes.values()))


def _contract(signature: Signature, attends: bool) -> InputContract:
    masks = [s.name for s in signature.inputs if s.name == "attention_mask"]
    mask = masks[0] if masks else None
    return InputContract(attends=attends and mask is not None, mask=mask)


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


def _encoder_folder(source: Source) -> Path | None:
    """Where the tokenizer of a model in ``folder/onnx/model.onnx`` or ``folder/model.onnx`` lies."""
    if source.path is None:
        return None
    folder = source.path.parent
    places = [folder, folder.parent] if folder.name == "onnx" else [folder]
    files = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
    return next((place for place in places if any((place / name).is_file() for name in files)), None)
