"""Export to ONNX: one adapter over `transformers.exporters` and over `torch.onnx.export` for every other module."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifact import Artifact, Signature
from exporter.errors import InternalError, RequestError
from exporter.onnx_files import save_model, strip_metadata

if TYPE_CHECKING:
    import onnx_ir

    from exporter.original import Original

DEFAULT_OPSET = 20
MODEL_FILE = "model.onnx"


def export_onnx(
    original: Original, folder: Path, *, opset: int = DEFAULT_OPSET, external_data: bool | None = None
) -> Artifact:
    """Export the original to ONNX with named dynamic axes and standard operators only.

    Args:
        original: A PyTorch original, in FP32 and in evaluation mode.
        folder: Where ``model.onnx`` is written, with its external data beside it where the weights need it.
        opset: Version of the ONNX operator set.
        external_data: As `exporter.onnx_files.save_model` has it.

    Returns:
        The exported graph, with the original's contract and signature (in which a length of an output is free where the
        graph leaves it so). Stack traces and paths are stripped, so that
        two exports of one original are byte-identical.

    Raises:
        RequestError: The exporter cannot express the model; says which part.
    """
    model = _export(original, opset)
    signature = _with_free_outputs(model, original.signature)
    _name_axes(model, signature)
    _check_interface(model, signature)
    strip_metadata(model)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MODEL_FILE
    save_model(model, path, external_data=external_data)
    return Artifact(path, "onnx", signature, original.contract)


def dynamic_shapes(signature: Signature) -> dict[str, dict[int, Any]]:
    """`torch.export`'s dynamic shapes: input name to dimension to `torch.export.Dim`, ranges as in the signature."""
    import torch

    dims = {axis.name: torch.export.Dim(axis.name, min=axis.min, max=axis.max) for axis in signature.axes}
    return {
        spec.name: {index: dims[axis] for index, axis in enumerate(spec.shape) if isinstance(axis, str)}
        for spec in signature.inputs
    }


def _export(original: Original, opset: int) -> onnx_ir.Model:
    import torch
    from transformers import PreTrainedModel

    module = original.module
    shapes = dynamic_shapes(original.signature)
    try:
        with torch.no_grad():
            if isinstance(module, PreTrainedModel):
                from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

                config = OnnxConfig(dynamic=True, dynamic_shapes=shapes, opset_version=opset)
                found = OnnxExporter().export(module, dict(original.example), config=config)
                return getattr(found, "program", None) or found.model  # earlier transformers give torch's own
            program = torch.onnx.export(
                module,
                kwargs=dict(original.example),
                dynamo=True,
                dynamic_shapes=shapes,
                opset_version=opset,
                input_names=[spec.name for spec in original.signature.inputs],
                output_names=[spec.name for spec in original.signature.outputs],
                verbose=False,
            )
    except Exception as error:  # tracing runs the user's own code, which may raise anything
        raise export_error(error) from error
    if program is None:
        raise InternalError("torch.onnx.export returned nothing", type(module).__name__)
    return program.model


def export_error(error: Exception) -> RequestError:
    """What an exporter's exception means to a user: its last cause, in one line."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    told = f"{type(cause).__name__}: {lines[0] if lines else 'no message'}"
    return RequestError(
        "the model cannot be traced for export",
        told[:400],
        "Control flow on tensor values and in-place surprises are the usual causes; the log has the full story",
    )


def _with_free_outputs(model: onnx_ir.Model, signature: Signature) -> Signature:
    """`signature` without the output lengths that only looked fixed: where the tracer says that they follow the inputs.

    A length that was the same whenever the model was observed may change further away.
    """
    outputs = []
    for value, spec in zip(model.graph.outputs, signature.outputs, strict=False):
        shape = list(spec.shape)
        if value.shape is not None and len(value.shape) == len(shape):
            for index, dim in enumerate(value.shape):
                if isinstance(shape[index], int) and not isinstance(dim, int) and dim.value is not None:
                    shape[index] = f"{spec.name}_{index}"
        outputs.append(replace(spec, shape=tuple(shape)))
    return replace(signature, outputs=(*outputs, *signature.outputs[len(outputs) :]))


def _name_axes(model: onnx_ir.Model, signature: Signature) -> None:
    """Give the graph's symbolic dimensions the signature's axis names, and its inputs and outputs their shapes."""
    import onnx_ir

    names: dict[str, str] = {}
    for value, spec in zip(model.graph.inputs, signature.inputs, strict=True):
        for dim, axis in zip(value.shape or (), spec.shape, strict=True):
            if isinstance(axis, str) and not isinstance(dim, int) and dim.value is not None:
                names[dim.value] = axis
    if not names:
        return
    pattern = re.compile(r"\b(" + "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) + r")\b")
    for value in _values(model):
        if value.shape is None:
            continue
        for index, dim in enumerate(value.shape):
            if not isinstance(dim, int) and dim.value is not None:
                value.shape[index] = onnx_ir.SymbolicDim(pattern.sub(lambda found: names[found[1]], dim.value))
    for value, spec in zip(model.graph.outputs, signature.outputs, strict=False):
        value.shape = onnx_ir.Shape(list(spec.shape))


def _values(model: onnx_ir.Model) -> list[onnx_ir.Value]:
    seen: dict[int, Any] = {}
    for graph in (model.graph, *(f.graph for f in model.functions.values())):
        for value in graph.inputs:
            seen[id(value)] = value
        for node in graph.all_nodes() if hasattr(graph, "all_nodes") else graph:
            for value in node.outputs:
                seen[id(value)] = value
    return list(seen.values())


def _check_interface(model: onnx_ir.Model, signature: Signature) -> None:
    """The graph must take and give exactly what the signature says: exporters drop inputs that nothing reads."""
    for kind, values, specs in (
        ("inputs", model.graph.inputs, signature.inputs),
        ("outputs", model.graph.outputs, signature.outputs),
    ):
        have, want = [value.name for value in values], [spec.name for spec in specs]
        if have != want:
            raise InternalError(f"the exported graph has other {kind} than the original", f"{have} instead of {want}")
    standard = {"", "ai.onnx"}
    if foreign := sorted({node.domain for node in model.graph if node.domain not in standard}):
        raise InternalError("the exported graph uses operators outside the ONNX standard", ", ".join(foreign))


def import_onnx(original: Original, folder: Path) -> Artifact:
    """Take an ONNX source as the export: nothing is traced, only metadata that tells of the exporter's machine goes."""
    from exporter.onnx_files import load_model

    if original.source.path is None:
        raise InternalError("an ONNX source without a file", original.source.spec)
    model = load_model(original.source.path)
    strip_metadata(model)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MODEL_FILE
    save_model(model, path)
    return Artifact(path, "onnx", original.signature, original.contract)
