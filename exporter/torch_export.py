"""Export to a `torch.export` program, which the inductor targets compile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifact import Artifact
from exporter.onnx_export import dynamic_shapes, export_error

if TYPE_CHECKING:
    from torch import nn

    from exporter.original import Original

PROGRAM_FILE = "model.pt2"


def export_program(original: Original, folder: Path, *, precision: str = "fp32") -> Artifact:
    """Export the original to a `torch.export` program with the signature's dynamic axes.

    Args:
        original: A PyTorch original, in FP32 and in evaluation mode; its module is lowered in place.
        folder: Where ``model.pt2`` is written.
        precision: ``"fp32"``, ``"fp16"`` or ``"bf16"``: what weights and arithmetic are in, as PyTorch itself lowers a
            module. Inputs and outputs stay as the signature has them.

    Raises:
        RequestError: The model cannot be traced; says why.
    """
    import torch
    from transformers import PreTrainedModel

    module = original.module
    if precision != "fp32":
        lower_module(module, precision)
    shapes = dynamic_shapes(original.signature)
    try:
        with torch.no_grad():
            if isinstance(module, PreTrainedModel):
                from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

                config = DynamoConfig(dynamic=True, dynamic_shapes=shapes)
                found = DynamoExporter().export(module, dict(original.example), config=config)
                program = getattr(found, "program", found)  # earlier transformers give torch's own
            else:
                program = torch.export.export(
                    module, (), kwargs=dict(original.example), dynamic_shapes=shapes, strict=False
                )
    except Exception as error:  # tracing runs the user's own code, which may raise anything
        raise export_error(error) from error
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PROGRAM_FILE
    torch.export.save(program, path)
    return Artifact(path, "pt2", original.signature, original.contract)


def lower_module(module: nn.Module, precision: str) -> None:
    """Lower a module in place, its inputs and outputs excepted: floats are cast on the way in and out.

    Args:
        module: Whose ``forward`` takes inputs by name and returns outputs by name, as an `Original`'s does.
        precision: ``"fp16"`` or ``"bf16"``.
    """
    import inspect

    import torch

    from exporter.original.shapes import sign_forward

    half = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    base = type(module)
    names = tuple(inspect.signature(base.forward).parameters)[1:]

    def forward(self: Any, **given: Any) -> dict[str, Any]:
        lowered = {name: value.to(half) if value.is_floating_point() else value for name, value in given.items()}
        found = base.forward(self, **lowered)
        return {name: value.float() if value.dtype == half else value for name, value in found.items()}

    module.to(half)
    sign_forward(module, forward, names)
