"""Reading a recipe's YAML and the command line's ``--set key=value`` into plain data."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from exporter.errors import RequestError

MAX_RECIPE_BYTES = 1 << 20
_PATHS = {"data": ("evaluation",), "calibration": ("data",), "compress": ("data", "validation", "unlabelled")}
_SOURCE_FILES = (".onnx", ".pt2", ".pt", ".pth", ".bin")


class _Loader(yaml.SafeLoader):
    """YAML's plain types only, and no key twice (YAML forbids it; PyYAML lets the last one win in silence)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    line = key_node.start_mark.line + 1
                    raise RequestError("a key is given twice", f"{key!r} in line {line}", "Keep one of the two")
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 wants a point in a number with an exponent, YAML 1.2 does not, and nobody means text by 2e-5.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        RequestError: No such file, not UTF-8, not YAML, a key given twice, or not a mapping with text keys.
    """
    try:
        if not path.is_file():
            found = "a folder" if path.is_dir() else "no such file"
            raise RequestError(f"cannot read the recipe, {found}", path, "Give the path of a YAML file")
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise RequestError("the recipe is too large", path, f"It may have {MAX_RECIPE_BYTES} bytes")
        content = path.read_bytes()
    except OSError as error:
        raise RequestError("cannot read the recipe", f"{path} ({error.strerror})", "Check the path") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{path}, byte {error.start}"
        raise RequestError("the recipe is not UTF-8", where, "Save it with UTF-8 encoding") from error
    data = _parse(text, str(path))
    if not isinstance(data, dict):
        kind = "empty" if data is None else f"a {type(data).__name__}"
        raise RequestError(f"the recipe is {kind}, not a mapping", path, "Write 'key: value' lines, at least 'source:'")
    _check_keys(data, str(path))
    return data


def parse_overrides(items: Iterable[str]) -> dict[str, Any]:
    """``["latency.budget_s=10", "precisions=[fp32]"]`` as nested data; values are YAML, later ones win.

    Raises:
        RequestError: No ``=``, an empty key, a value that is not YAML, or a key that is a value and a section at once.
    """
    data: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        parts = [part.strip() for part in key.split(".")]
        if not equals or not all(parts):
            raise RequestError("an override is not key=value", item, "Write for example --set latency.budget_s=10")
        section = data
        for part in parts[:-1]:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise RequestError(
                    "an override treats a value as a section", item, f"{part!r} was given a value before"
                )
        section[parts[-1]] = _parse(text, item)
    return data


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, section by section, items of a list by their number; neither is modified."""
    return {**base, **{key: _laid_over(base.get(key), value) for key, value in changes.items()}}


def _laid_over(below: Any, value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    if isinstance(below, Mapping):
        return merge(below, value)
    numbers = {str(number) for number in range(len(below))} if isinstance(below, list | tuple) else set()
    if not value or not set(value) <= numbers:
        return value
    return [_laid_over(item, value[str(n)]) if str(n) in value else item for n, item in enumerate(below)]


def anchor_paths(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """`data` with its relative paths (``source`` where it is one, those of data) made absolute from `folder`."""
    anchored = dict(data)
    if isinstance(source := data.get("source"), str):
        anchored["source"] = _anchor_source(source, folder)
    for name, keys in _PATHS.items():
        section = data.get(name)
        if isinstance(section, Mapping):
            given = {key: section[key] for key in keys if isinstance(section.get(key), str) and section[key]}
            anchored[name] = {**section, **{key: _absolute(path, folder) for key, path in given.items()}}
    section = anchored.get("compress")
    if isinstance(section, Mapping) and isinstance(steps := section.get("steps"), list | tuple):
        anchored["compress"] = {**section, "steps": [_anchor_step(step, folder) for step in steps]}
    return anchored


def _anchor_step(step: Any, folder: Path) -> Any:
    """A distilling step with the checkpoints that it names made absolute where they are paths."""
    distil = step.get("distil") if isinstance(step, Mapping) else None
    if not isinstance(distil, Mapping):
        return step
    named = {key: distil[key] for key in ("teacher", "student") if isinstance(distil.get(key), str)}
    return {**step, "distil": {**distil, **{key: _anchor_source(name, folder) for key, name in named.items()}}}


def _anchor_source(source: str, folder: Path) -> str:
    """A hub id, ``package:folder`` and ``module:factory`` look like paths; only what exists or must be one is."""
    is_path = source.startswith((".", "/", "~")) or source.lower().endswith(_SOURCE_FILES)
    if source and (is_path or (folder / source).exists()):
        return _absolute(source, folder)
    return source


def _absolute(path: str, folder: Path) -> str:
    return os.path.normpath(folder.absolute() / Path(path).expanduser())


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise RequestError("the YAML is nested too deeply", where, "A recipe has three levels") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise RequestError(f"not valid YAML ({reason})", f"{where}{line}", "Correct the line") from error


def _check_keys(data: dict[Any, Any], where: str) -> None:
    for key, value in data.items():
        if not isinstance(key, str):
            raise RequestError("a key of the recipe is not text", f"{key!r} in {where}", "Quote it")
        if isinstance(value, dict):
            try:
                _check_keys(value, where)
            except RecursionError as error:
                raise RequestError("the recipe contains itself", key, "Remove the alias") from error
