"""Trainings that were interrupted: what they were asked for, so that another recipe is not mistaken for the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SETTINGS = "planish_training.json"
"""Beside the checkpoints of a training: what it was asked for."""


def note_settings(folder: Path, asked: Mapping[str, Any]) -> str:
    """Write down what a training was asked for, and say how one that was interrupted before differs; or nothing.

    Args:
        folder: Of the training's checkpoints, beside those of others.
        asked: ``step`` (its kind), ``source`` (digest of the model) and ``settings``, plain data.
    """
    if has_checkpoint(folder):
        return ""
    differing = ""
    for path in sorted(folder.parent.glob(f"*/{SETTINGS}")) if folder.parent.is_dir() else []:
        other = json.loads(path.read_text(encoding="utf-8"))
        same = (other.get("step"), other.get("source")) == (asked["step"], asked["source"])
        if path.parent != folder and same and has_checkpoint(path.parent):
            differing = ", ".join(differences(other["settings"], asked["settings"])) or "data, teacher or seed"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS).write_text(json.dumps(asked, indent=1), encoding="utf-8")
    if not differing:
        return ""
    return f"an interrupted training of this model by another recipe is not gone on with: it differs in {differing}"


def has_checkpoint(folder: Path) -> bool:
    """Whether a training can go on from there."""
    return any(folder.glob("checkpoint-*/trainer_state.json"))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, with both."""
    found = []
    for key in sorted({*old, *new}):
        was, now = old.get(key), new.get(key)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            found += differences(was, now, f"{prefix}{key}.")
        elif was != now:
            found.append(f"{prefix}{key} ({was} then, {now} now)")
    return found
