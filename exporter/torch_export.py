"""Export to a `torch.export` program, which the inductor targets compile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from exporter.artifact import Artifact
from exporter.onnx_export import dynamic_shapes, export_error

if TYPE_CHECKING:
    from exporter.original import Original

PROGRAM_FILE = "model.pt2"


def export_program(original: Original, folder: Path) -> Artifact:
    """Export the original to a `torch.export` program with the signature's dynamic axes.

    Args:
        original: A PyTorch original, in FP32 and in evaluation mode.
        folder: Where ``model.pt2`` is written.

    Raises:
        RequestError: The model cannot be traced; says why.
    """
    import torch
    from transformers import PreTrainedModel

    module = original.module
    shapes = dynamic_shapes(original.signature)
    try:
        with torch.no_grad():
            if isinstance(module, PreTrainedModel):
                from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

                config = DynamoConfig(dynamic=True, dynamic_shapes=shapes)
                program = DynamoExporter().export(module, dict(original.example), config=config).program
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
