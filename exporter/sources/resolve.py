"""From what the user wrote to a source: the grammar of source specifications."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from exporter.errors import RequestError
from exporter.sources.factory import resolve_factory
from exporter.sources.files import resolve_onnx, resolve_pt2
from exporter.sources.folder import resolve_folder
from exporter.sources.hub import fetch, is_hub_id
from exporter.sources.source import Source, bundle_name

GRAMMAR = (
    "A source is a model folder, a hub id (org/name), package:folder, module:factory, a .pt2 program or an .onnx file"
)
_GENERIC_NAMES = {"", ".", "model", "models", "weights", "data", "checkpoint"}
_COLON_FORM = re.compile(r"^([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(.*)$", re.DOTALL)
_ATTRIBUTE = re.compile(r"^[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*$")


def resolve_source(
    spec: str, *, revision: str | None = None, trust: bool = False, trust_remote_code: bool = False
) -> Source:
    """Find the model that `spec` names and look at it, without opening it where that can be avoided.

    Args:
        spec: An existing folder; ``package:folder`` (files inside an installed package, which is not imported);
            ``module:factory`` (a callable that returns an ``nn.Module`` and example inputs: it is imported and
            called); a hub id ``org/name``; a ``.pt2`` program; an ``.onnx`` file. A folder of that name wins over a
            hub id, and a package's folder over a factory.
        revision: Branch, tag or commit of a hub id.
        trust: Allow what is code: ``.pt2`` programs.
        trust_remote_code: Allow the Python files of a model folder to run.

    Raises:
        RequestError: There is no such source, or it is broken, or it needs trust that was not given.
    """
    if not isinstance(spec, str) or not spec.strip():
        raise RequestError("no source was given", repr(spec), GRAMMAR)
    path = Path(spec).expanduser()
    if path.is_dir():
        return resolve_folder(
            spec, path, kind="huggingface", name=_folder_name(path), trust_remote_code=trust_remote_code
        )
    if path.suffix.lower() == ".pt2":
        return resolve_pt2(spec, path, trust=trust)
    if path.suffix.lower() == ".onnx":
        return resolve_onnx(spec, path)
    if path.is_file():
        raise RequestError("a file of this kind is no source", path, GRAMMAR)
    if match := _COLON_FORM.match(spec):
        return _resolve_colon(spec, match.group(1), match.group(2), trust_remote_code=trust_remote_code)
    if is_hub_id(spec):
        folder = fetch(spec, revision=revision, with_code=trust_remote_code)
        return resolve_folder(
            spec, folder, kind="huggingface", name=bundle_name(spec.split("/")[-1]), trust_remote_code=trust_remote_code
        )
    raise RequestError("there is no such folder or file", spec, GRAMMAR)


def _resolve_colon(spec: str, module: str, rest: str, *, trust_remote_code: bool) -> Source:
    root = _package_root(module)
    if root is not None:
        folder = (root / rest).resolve()
        if not folder.is_relative_to(root.resolve()) or Path(rest).is_absolute():
            raise RequestError("the folder lies outside its package", spec, f"Name a folder inside {module}")
        if folder.is_dir() and rest:
            name = module.split(".")[-1] if folder.name in _GENERIC_NAMES or rest == "." else folder.name
            name = bundle_name(name.replace("_", "-"))
            source = resolve_folder(
                spec,
                folder,
                kind="package",
                name=bundle_name(name.replace("_", "-")),
                trust_remote_code=trust_remote_code,
            )
            return _with_package_licence(source, module.split(".")[0])
    if _ATTRIBUTE.match(rest):
        return resolve_factory(spec, module, rest)
    if root is None:
        raise RequestError("there is no such package", module, f"Install it, or check the spelling. {GRAMMAR}")
    raise RequestError("the package has no such folder", spec, f"It was looked for in {root}")


def _package_root(module: str) -> Path | None:
    """The folder of a package, found without importing it (importing would run its code)."""
    first, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(first)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    roots = [Path(location).joinpath(*rest) for location in spec.submodule_search_locations]
    return next((root for root in roots if root.is_dir()), None)


def _with_package_licence(source: Source, package: str) -> Source:
    from dataclasses import replace
    from importlib import metadata

    if source.licence is not None:
        return source
    for distribution in metadata.packages_distributions().get(package, []):
        fields = metadata.metadata(distribution)
        for key in ("License-Expression", "License"):
            if key in fields and "\n" not in fields[key]:  # some packages put the licence's whole text there
                return replace(source, licence=fields[key])
    return source


def _folder_name(path: Path) -> str:
    resolved = path.resolve()
    name = resolved.parent.name if resolved.name in _GENERIC_NAMES else resolved.name
    return bundle_name(name)
