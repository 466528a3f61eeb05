"""The other files that hold a tokenizer's vocabulary or ids beside ``tokenizer.json``, and what they name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from exporter.errors import RequestError
from pipelines.compress.tokenizer_cut import TOKENIZER

CONFIG = "tokenizer_config.json"
_MAP, _ADDED, _GENERATION = "special_tokens_map.json", "added_tokens.json", "generation_config.json"
_OTHER_FORMS = re.compile(r"^([\w.-]+\.(model|vocab|spm|tiktoken)|bpe\.codes|dict\.txt)$")
_ID_KEY = re.compile(r"_token_(ids?|index)$")


def token_ids(settings: Mapping[str, Any]) -> dict[str, list[int]]:
    """The token ids in a configuration's own fields, by their keys."""
    found = {}
    for key, value in settings.items():
        if _ID_KEY.search(key):
            values = value if isinstance(value, list | tuple) else [value]
            if ids := [number for number in values if type(number) is int and number >= 0]:
                found[key] = ids
    return found


def new_ids(value: Any, mapping: Mapping[int, int]) -> Any:
    """The value of a field that `token_ids` named, renumbered: ``None`` for what is no token any more, or never was."""
    if isinstance(value, list | tuple):
        return [mapping[number] for number in value if number in mapping]
    return mapping.get(value)


def check_names(folder: Path, tokens: Mapping[int, str]) -> set[int]:
    """Ids of the tokens that the folder's files name as special or added; these stay.

    Raises:
        RequestError: A file gives a token an id that it does not have in ``tokenizer.json``.
    """
    ids = {token: number for number, token in tokens.items()}
    settings = _read(folder / CONFIG)
    declared = {token: (number, _ADDED) for token, number in _read(folder / _ADDED).items()}
    for number, token in (settings.get("added_tokens_decoder") or {}).items():
        declared[_text(token)] = (number, CONFIG)
    for content, (number, name) in declared.items():
        if ids.get(content) != int(number):
            found = "is not there" if content not in ids else f"has id {ids[content]} there"
            raise RequestError(
                f"{name} and {TOKENIZER} disagree on a token",
                f"{content!r} with id {number} {found}",
                "Write both anew: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
            )
    named = {text for part in (settings, _read(folder / _MAP)) for text in _special(part)}
    fields = (token_ids(part).values() for part in (settings, _read(folder / _GENERATION)))
    numbers = {number for part in fields for values in part for number in values}
    return {ids[text] for text in (*named, *declared) if text in ids} | (numbers & tokens.keys())


def write_files(
    source: Path, out: Path, data: Mapping[str, Any], kind: str, mapping: Mapping[int, int]
) -> tuple[list[str], dict[str, str]]:
    """Write the tokenizer's files with the vocabulary that was cut.

    Args:
        source: The folder that has the old ones; each is written only if it is there.
        out: Where to; it is made.
        data: Content of the new ``tokenizer.json``.
        kind: Of its model: ``"WordPiece"`` …
        mapping: New ids by old ones.

    Returns:
        Names of the files in `out`, and by name of those that are left out, why.
    """
    out.mkdir(parents=True, exist_ok=True)
    _write(out / TOKENIZER, json.dumps(data, ensure_ascii=False, separators=(",", ":")))
    written, dropped = [TOKENIZER], {}
    for path in sorted(source.iterdir()):
        name = path.name
        if name in _FORMS:
            kinds, make = _FORMS[name]
            if kind in kinds:
                _write(out / name, make(data["model"], path))
                written.append(name)
            else:
                dropped[name] = f"it has the old vocabulary in a form that a {kind} tokenizer does not define"
        elif name in (CONFIG, _ADDED, _GENERATION):
            settings = _read(path)
            changed = _added(settings, mapping) if name == _ADDED else _settings(settings, mapping)
            _write(out / name, json.dumps(changed, ensure_ascii=False, indent=2) + "\n")
            written.append(name)
        elif name == _MAP:
            shutil.copyfile(path, out / name)
            written.append(name)
        elif _OTHER_FORMS.match(name):
            dropped[name] = f"it has the old vocabulary; {TOKENIZER} says all that it says"
    return written, dropped


def _lines(model: Mapping[str, Any], _: Path) -> str:
    return "".join(f"{token}\n" for token in model["vocab"])


def _merge_lines(model: Mapping[str, Any], path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        first = file.readline()
    head = first if first.startswith("#version") else ""
    return head + "".join(f"{m if isinstance(m, str) else ' '.join(m)}\n" for m in model["merges"])


_FORMS: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any], Path], str]]] = {
    "vocab.txt": (("WordPiece", "WordLevel"), _lines),
    "vocab.json": (("BPE", "WordLevel"), lambda model, _: json.dumps(model["vocab"], ensure_ascii=False)),
    "merges.txt": (("BPE",), _merge_lines),
}
"""Older forms of a vocabulary: for which kinds of tokenizer models they are known, and their content."""


def _added(tokens: Mapping[str, Any], mapping: Mapping[int, int]) -> dict[str, int]:
    return {token: mapping[int(number)] for token, number in tokens.items()}


def _settings(settings: Mapping[str, Any], mapping: Mapping[int, int]) -> dict[str, Any]:
    new = dict(settings)
    if "added_tokens_decoder" in new:
        new["added_tokens_decoder"] = {
            str(mapping[int(number)]): token for number, token in (new["added_tokens_decoder"] or {}).items()
        }
    return new | {key: new_ids(settings[key], mapping) for key in token_ids(settings)}


def _special(settings: Mapping[str, Any]) -> list[str]:
    """Texts of the tokens under ``…_token`` and in the lists of further special tokens."""
    values: list[Any] = [value for key, value in settings.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        further = settings.get(key) or ()
        values += further.values() if isinstance(further, dict) else further
    return [text for text in map(_text, values) if text]


def _text(token: Any) -> str:
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else ""


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(f"{path.name} is not valid JSON ({error})", path, "Copy or download it again") from error
    return found if isinstance(found, dict) else {}


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
