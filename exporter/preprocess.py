"""From texts and images to model inputs, without torch or transformers: what a bundle needs to be served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from exporter.artifact import Signature
from exporter.encoders.image import ImageEncoder, ImageSettings
from exporter.encoders.text import Encoded, TextEncoder
from exporter.errors import RequestError
from exporter.tasks.registry import Task

__all__ = ["Encoded", "ImageEncoder", "ImageSettings", "TextEncoder", "load_encoder"]


def load_encoder(folder: Path, task: Task, signature: Signature) -> TextEncoder | ImageEncoder | None:
    """The pre-processing that fits a model's inputs.

    Args:
        folder: A model folder or a bundle.
        task: What the model does; decides what is cut from a pair that is too long.
        signature: The model's inputs: which of them to make, and the longest sequence.

    Returns:
        `None` for a model that takes raw tensors.

    Raises:
        RequestError: The folder lacks what its model's inputs need.
    """
    names = tuple(spec.name for spec in signature.inputs)
    if "input_ids" in names:
        limit = next((axis.max for axis in signature.axes if axis.name == "sequence"), None)
        return TextEncoder.load(folder, inputs=names, limit=limit, truncation=task.truncation)
    if "pixel_values" in names:
        return ImageEncoder.load(folder)
    return None


def read_labels(folder: Path) -> dict[int, str]:
    """Class names by index, from the folder's ``config.json``; empty where it names none."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    config: Any = json.loads(path.read_text(encoding="utf-8"))
    try:
        return {int(index): str(name) for index, name in (config.get("id2label") or {}).items()}
    except (ValueError, AttributeError) as error:
        raise RequestError("id2label in config.json must map indices to names", path) from error
