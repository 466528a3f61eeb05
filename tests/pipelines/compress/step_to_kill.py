"""Runs a step in a process that a test kills: ``python step_to_kill.py MODULE:FUNCTION ARGUMENTS.json SLEEP_S``."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from pipelines.compress import training


def main(name: str, arguments: str, sleep_s: str) -> None:
    step = training._Trainer.training_step

    def slower(self: Any, *given: Any, **named: Any) -> Any:
        time.sleep(float(sleep_s))  # so that the test can look and kill before it is through
        return step(self, *given, **named)

    training._Trainer.training_step = slower  # type: ignore[method-assign]
    module, function = name.split(":")
    getattr(importlib.import_module(module), function)(json.loads(Path(arguments).read_text(encoding="utf-8")))


if __name__ == "__main__":
    main(*sys.argv[1:])
