"""Writes the JSON Schemas of recipe and manifest: ``python -m pipelines.schemas [FOLDER]``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pydantic import BaseModel

from pipelines.manifest import Manifest
from pipelines.recipe import Recipe

FOLDER = Path("docs/schemas")


def schemas() -> dict[str, str]:
    """The schemas' texts by file name."""
    models: dict[str, type[BaseModel]] = {"recipe.schema.json": Recipe, "manifest.schema.json": Manifest}
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return {
        name: json.dumps(dialect | model.model_json_schema(), indent=2, sort_keys=True) + "\n"
        for name, model in models.items()
    }


def main() -> None:
    """Write them into the folder given, or `FOLDER`."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in schemas().items():
        (folder / name).write_text(text, encoding="utf-8")
        print(folder / name)


if __name__ == "__main__":
    main()
