"""A Hugging Face model folder as a source: its configuration, its small files, its licence."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path, PurePath
from typing import Any

from exporter.errors import RequestError
from exporter.sources.source import Source, SourceKind, digest_files
from exporter.sources.weights import find_weights, read_safetensors_header

# What belongs to a model beside its weights. Folders of other formats (onnx/, openvino/ …) are not looked into.
_SMALL_FILES = (
    re.compile(r"^(config|generation_config|preprocessor_config|processor_config|image_processor_config)\.json$"),
    re.compile(r"^(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json$"),
    re.compile(r"^(vocab|merges|bpe\.codes|dict)(\.txt)?$"),
    re.compile(r"^[\w.-]*(sentencepiece|spiece|spm|tokenizer)[\w.-]*\.(model|vocab)$"),
    re.compile(r"^(modules|config_sentence_transformers|sentence_\w+_config)\.json$"),
    re.compile(r"^(README|LICEN[CS]E|NOTICE|USE_POLICY|COPYING)[\w.-]*$", re.IGNORECASE),
)
_CODE_FILE = re.compile(r"^[\w/]+\.py$")
# The weights of a module behind the encoder: the first of these that there is.
MODULE_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def resolve_folder(spec: str, path: Path, *, kind: SourceKind, name: str, trust_remote_code: bool) -> Source:
    """Look at a model folder and describe it.

    Raises:
        RequestError: The folder is empty, has no (sound) configuration or weights, or is of an unknown model type.
    """
    if not path.is_dir():
        raise RequestError("the model's folder does not exist", path, "Check the path")
    if not any(path.iterdir()):
        raise RequestError("the model's folder is empty", path, "It must hold config.json and model.safetensors")
    config = read_config(path)
    check_model_type(config, path, trust_remote_code=trust_remote_code)
    weights = find_weights(path)
    files = small_files(path, with_code=trust_remote_code)
    modules = _module_weights(path)
    read_json_files(path, files)
    hashed = {*weights.files, *modules, *files, *([weights.index] if weights.index else [])}
    return Source(
        kind=kind,
        spec=spec,
        path=path,
        name=name,
        digest=digest_files(path, hashed),
        licence=read_licence(path),
        weights_bytes=weights.bytes + sum((path / name).stat().st_size for name in modules),
        parameters=None if weights.parameters is None else weights.parameters + _elements(path, modules),
        files=files,
        weights=(*weights.files, *modules),
        trust_remote_code=trust_remote_code,
        pickled=weights.pickled,
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json``.

    Raises:
        RequestError: It is missing, is no JSON object, or names no model type.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise RequestError("the folder has no config.json", folder, "Is it a Hugging Face model folder?")
    config = _read_json(path)
    if not isinstance(config, dict):
        raise RequestError("config.json must hold a JSON object", path, f"It holds a {type(config).__name__}")
    if not isinstance(config.get("model_type"), str):
        raise RequestError("config.json names no model type", path, 'Add "model_type", for example "bert"')
    return config


def check_model_type(config: dict[str, Any], folder: Path, *, trust_remote_code: bool) -> None:
    """Refuse a model type that transformers does not know, and code of the folder's own without the user's consent."""
    model_type = config["model_type"]
    if trust_remote_code and config.get("auto_map"):
        return
    if model_type in _known_model_types():
        return
    if config.get("auto_map"):
        raise RequestError(
            "the model brings Python code of its own, which is not trusted",
            f"model type {model_type!r} in {folder}",
            "Read the code, then allow it with trust_remote_code: true",
        )
    import difflib

    near = difflib.get_close_matches(model_type, _known_model_types(), n=3)
    hint = f"Nearest known types: {', '.join(near)}" if near else "A newer transformers may know it"
    raise RequestError(
        "transformers does not know this model type", f"{model_type!r} in {folder / 'config.json'}", hint
    )


def small_files(folder: Path, *, with_code: bool = False) -> tuple[str, ...]:
    """The folder's small files, relative and sorted; its Python files too where their code is trusted."""
    names = []
    for path in [*folder.iterdir(), *folder.glob("*_*/*")]:
        name = path.relative_to(folder).as_posix()
        wanted = any(pattern.match(name) for pattern in _SMALL_FILES) or (with_code and _CODE_FILE.match(name))
        if wanted and path.is_file():
            names.append(name)
    configs = (f"{module}/config.json" for module in module_folders(folder))
    return tuple(sorted({*names, *(name for name in configs if (folder / name).is_file())}))


def module_folders(folder: Path) -> tuple[str, ...]:
    """The folders of the modules behind the encoder, relative, as sentence-transformers' ``modules.json`` names them.

    Raises:
        RequestError: One lies outside the model's folder.
    """
    path = folder / "modules.json"
    try:
        modules = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    except ValueError:
        return ()  # `read_json_files` says what is wrong with it
    if not isinstance(modules, list):
        return ()
    named = [str(module.get("path") or "") for module in modules if isinstance(module, dict)]
    return tuple(dict.fromkeys(PurePath(name).as_posix() for name in named if module_folder(folder, name) != folder))


def module_folder(folder: Path, name: str) -> Path:
    """The folder of a module that ``modules.json`` places at `name`, which is the model's own folder or inside it.

    Raises:
        RequestError: It lies outside the model's folder.
    """
    inside = PurePath(name)
    leaves = inside.is_absolute() or ".." in inside.parts
    if leaves or not (folder / inside).resolve().is_relative_to(folder.resolve()):
        raise RequestError("modules.json names a module outside the model's folder", name, f"Put it into {folder}")
    return folder / inside


def read_json_files(folder: Path, names: tuple[str, ...]) -> None:
    """Parse every JSON file among `names`, so that a broken one is named before anything else stumbles over it."""
    for name in names:
        if name.endswith(".json"):
            _read_json(folder / name)


def read_licence(folder: Path) -> str | None:
    """The licence from the front matter of the folder's model card."""
    import yaml

    path = folder / "README.md"
    if not path.is_file():
        return None
    match = re.match(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    if match is None:
        return None
    try:
        card = yaml.safe_load(match.group(1))
    except yaml.YAMLError:
        return None  # a model card is prose: a broken one must not stop an export
    if not isinstance(card, dict):
        return None
    licence = card.get("license_name") if card.get("license") == "other" else card.get("license")
    if isinstance(licence, list):
        return " AND ".join(str(item) for item in licence) or None
    return str(licence) if licence else None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError(f"{path.name} is not UTF-8 text", path, "Copy or download the file again") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise RequestError(f"{path.name} is not valid JSON ({place})", path, "Repair or download the file") from error


def _known_model_types() -> set[str]:
    """Model types that transformers knows, from its generated table where it has one: importing it all takes long."""
    import importlib.util
    import runpy

    spec = importlib.util.find_spec("transformers")
    if spec is not None and spec.submodule_search_locations:
        table = Path(spec.submodule_search_locations[0]) / "models" / "auto" / "auto_mappings.py"
        if table.is_file():
            return set(runpy.run_path(str(table)).get("CONFIG_MAPPING_NAMES", ()))
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return set(CONFIG_MAPPING_NAMES)


def _module_weights(folder: Path) -> tuple[str, ...]:
    """Weights of the modules behind the encoder (sentence-transformers' dense layers)."""
    candidates = ([f"{module}/{name}" for name in MODULE_WEIGHTS] for module in module_folders(folder))
    found = (next((name for name in names if (folder / name).is_file()), None) for names in candidates)
    return tuple(sorted(name for name in found if name is not None))


def _elements(folder: Path, names: tuple[str, ...]) -> int:
    headers = [read_safetensors_header(folder / name) for name in names if name.endswith(".safetensors")]
    return sum(math.prod(entry.get("shape", ())) for header in headers for entry in header.values())
