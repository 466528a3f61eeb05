"""Cutting a ``tokenizer.json``: which tokens have to stay beside those that texts use, and the file with new ids.

What is kept always includes everything that the encoding of a text went through, so that a text whose tokens are all
kept is split as before: fewer tokens only take alternatives away. The kinds of models and their encoding are those of
the `tokenizers` library (https://huggingface.co/docs/tokenizers/api/models).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from exporter.errors import RequestError

Section = dict[str, Any]
TOKENIZER = "tokenizer.json"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Family:
    """How tokenizers of one kind of model are cut. Each function is given the file's section ``model``.

    Attributes:
        always: Ids that stay for any text's sake: from these, whatever was in no text is spelled.
        parts: Ids of the tokens that tokens with these ids are put together from.
        stumbled: Ids of the tokens that these words, which end as unknown, match before they fail.
        renumber: The section with the kept tokens alone, under their new ids.
    """

    always: Callable[[Section], set[int]]
    parts: Callable[[Section, set[int]], set[int]]
    stumbled: Callable[[Section, Iterable[str]], set[int]]
    renumber: Callable[[Section, Mapping[int, int]], Section]


def read_tokenizer_file(folder: Path) -> dict[str, Any]:
    """The folder's ``tokenizer.json``.

    Raises:
        RequestError: There is none, or it is broken.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        remedy = "Write it with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        raise RequestError(f"only a vocabulary in {TOKENIZER} can be cut, and the folder has none", folder, remedy)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        sound = isinstance(data["model"]["vocab"], list | dict) or isinstance(data["model"].get("type"), str)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"{TOKENIZER} is broken ({error!r})", path, "Copy or download it again") from error
    if not sound:
        raise RequestError(f"{TOKENIZER} has no vocabulary", path, "Copy or download it again")
    return dict(data)


def family_of(data: Mapping[str, Any]) -> tuple[str, Family]:
    """The kind of a tokenizer's model, and how it is cut.

    Raises:
        RequestError: Its kind is not known, or it encodes at random.
    """
    name = data["model"].get("type") or _untold(data["model"])
    if name not in FAMILIES:
        raise RequestError(
            "vocabularies of this kind of tokenizer cannot be cut", name, f"These can: {', '.join(sorted(FAMILIES))}"
        )
    if data["model"].get("dropout"):
        remedy = f"Set dropout in {TOKENIZER} to null: it is meant for training"
        raise RequestError("the tokenizer leaves merges out at random", f"dropout {data['model']['dropout']}", remedy)
    return str(name), FAMILIES[name]


def tokens_of(data: Mapping[str, Any]) -> dict[int, str]:
    """All tokens by id, added ones included."""
    added = {int(token["id"]): str(token["content"]) for token in data.get("added_tokens") or ()}
    return _pieces(data["model"]) | added


def named_ids(data: Mapping[str, Any]) -> set[int]:
    """Ids that the file names outside of its vocabulary: added tokens, padding, and what is put around texts."""
    found = {int(token["id"]) for token in data.get("added_tokens") or ()}

    def note(number: int) -> int:
        found.add(number)
        return number

    _change_ids(copy.deepcopy(dict(data)), note)
    return found


def cut_tokenizer(data: Mapping[str, Any], mapping: Mapping[int, int]) -> dict[str, Any]:
    """The file's content with the kept tokens alone. Normalizer, pre-tokenizer and decoder hold no ids and stay.

    Args:
        data: What `read_tokenizer_file` gave; it is left as it is.
        mapping: New ids by old ones, of the kept tokens; it keeps the order.
    """
    new = copy.deepcopy(dict(data))
    new["model"] = family_of(data)[1].renumber(new["model"], mapping)
    for token in new.get("added_tokens") or ():
        token["id"] = mapping[int(token["id"])]
    _change_ids(new, lambda number: mapping[number])
    return new


def _change_ids(data: dict[str, Any], change: Callable[[int], int]) -> None:
    if isinstance(padding := data.get("padding"), dict):
        padding["pad_id"] = change(int(padding["pad_id"]))
    _change_processor(data.get("post_processor"), change)


def _change_processor(processor: Any, change: Callable[[int], int]) -> None:
    if not isinstance(processor, dict):
        return
    for inner in processor.get("processors") or ():  # Sequence
        _change_processor(inner, change)
    for special in (processor.get("special_tokens") or {}).values():  # TemplateProcessing
        special["ids"] = [change(int(number)) for number in special["ids"]]
    for key in ("sep", "cls"):  # BertProcessing, RobertaProcessing
        if key in processor:
            processor[key] = [processor[key][0], change(int(processor[key][1]))]


def _untold(section: Section) -> str:
    """The kind of a model that does not say it, as files of the first versions do not."""
    if isinstance(section["vocab"], list):
        return "Unigram"
    if "merges" in section:
        return "BPE"
    return "WordPiece" if "max_input_chars_per_word" in section else "WordLevel"


def _pieces(section: Section) -> dict[int, str]:
    vocab = section["vocab"]
    if isinstance(vocab, list):  # Unigram: a token's id is its place
        return {number: str(piece) for number, (piece, _) in enumerate(vocab)}
    return {int(number): str(token) for token, number in vocab.items()}


def _ids_where(section: Section, wanted: Callable[[str], bool]) -> set[int]:
    unknown = section.get("unk_token")
    return {number for number, token in _pieces(section).items() if token == unknown or wanted(token)}


def _is_byte(token: str) -> bool:
    return _BYTE.fullmatch(token) is not None


def _nothing(section: Section, of: object) -> set[int]:
    return set()


def _renumber_dictionary(section: Section, mapping: Mapping[int, int]) -> Section:
    kept = {token: mapping[number] for token, number in section["vocab"].items() if number in mapping}
    return section | {"vocab": dict(sorted(kept.items(), key=lambda item: item[1]))}


# WordPiece: the longest piece that matches, from the word's beginning on; a word that fails anywhere is unknown.


def _word_piece_always(section: Section) -> set[int]:
    prefix = section.get("continuing_subword_prefix") or ""
    return _ids_where(section, lambda token: len(token) == 1 or len(token.removeprefix(prefix)) == 1)


def _word_piece_stumbled(section: Section, words: Iterable[str]) -> set[int]:
    """Without these an unknown word could be cut at other places, and then not fail."""
    vocab, prefix = section["vocab"], section.get("continuing_subword_prefix") or ""
    found: set[int] = set()
    for word in words:
        start = 0
        while start < len(word):
            head = prefix if start else ""
            end = next((end for end in range(len(word), start, -1) if head + word[start:end] in vocab), None)
            if end is None:
                break
            found.add(vocab[head + word[start:end]])
            start = end
    return found


# BPE: characters (or bytes) are merged by pairs, the pair that stands first in the list of merges first.


def _bpe_always(section: Section) -> set[int]:
    prefix, suffix = section.get("continuing_subword_prefix") or "", section.get("end_of_word_suffix") or ""

    def spells(token: str) -> bool:
        bare = token.removeprefix(prefix).removesuffix(suffix)
        return len(token) == 1 or len(bare) == 1 or _is_byte(token)

    return _ids_where(section, spells)


def _bpe_parts(section: Section, ids: set[int]) -> set[int]:
    """The tokens on the way to each token. The merges inside a token are the same in whatever word it comes to be: no
    merge goes across its ends, and those inside happen in the same order."""
    prefix, suffix = section.get("continuing_subword_prefix") or "", section.get("end_of_word_suffix") or ""
    ranks = {pair: rank for rank, pair in enumerate(_merges(section))}
    vocab, pieces = section["vocab"], _pieces(section)
    found: set[int] = set()
    for token in (pieces[number] for number in ids if number in pieces):
        parts, way = _symbols(token, prefix, suffix), set()
        while len(parts) > 1:
            way |= {vocab[part] for part in parts if part in vocab}
            pairs = [(ranks.get(pair, len(ranks)), place) for place, pair in enumerate(pairwise(parts))]
            rank, place = min(pairs)
            if rank == len(ranks):
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1].removeprefix(prefix)]
        if len(parts) == 1:  # or else no merges lead to it: an added token, or one that is taken whole
            found |= way
    return found


def _symbols(token: str, prefix: str, suffix: str) -> list[str]:
    head = prefix if prefix and token.startswith(prefix) else ""
    tail = suffix if suffix and token.endswith(suffix) else ""
    inner = token[len(head) : len(token) - len(tail)]
    if not inner:
        return [token]
    symbols = [head + inner[0], *(prefix + character for character in inner[1:])]
    symbols[-1] += tail
    return symbols


def _merges(section: Section) -> list[tuple[str, str]]:
    """The pairs, in files of all versions: ``["a", "b"]`` since 0.20, ``"a b"`` before."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in section["merges"])
    return [(str(first), str(second)) for first, second in pairs]


def _bpe_renumber(section: Section, mapping: Mapping[int, int]) -> Section:
    new, prefix = _renumber_dictionary(section, mapping), section.get("continuing_subword_prefix") or ""
    # All merges between kept tokens, not only those on the way to them: what texts did not have is split as before
    # as far as it can be.
    kept = [
        merge
        for merge, (first, second) in zip(section["merges"], _merges(section), strict=True)
        if {first, second, first + second.removeprefix(prefix)} <= new["vocab"].keys()
    ]
    return new | {"merges": kept}


# Unigram: of all ways to cut a text the one with the greatest sum of the pieces' scores.


def _unigram_always(section: Section) -> set[int]:
    found = _ids_where(section, lambda token: len(token) == 1 or _is_byte(token))
    if section.get("unk_id") is not None:
        found.add(int(section["unk_id"]))
    # An unknown character scores ten less than the least piece: were that gone, unknowns would come cheaper.
    least = min(range(len(section["vocab"])), key=lambda number: section["vocab"][number][1])
    return found | {least}


def _unigram_renumber(section: Section, mapping: Mapping[int, int]) -> Section:
    new = section | {"vocab": [entry for number, entry in enumerate(section["vocab"]) if number in mapping]}
    if section.get("unk_id") is not None:
        new["unk_id"] = mapping[int(section["unk_id"])]
    return new


FAMILIES: dict[str, Family] = {
    "WordPiece": Family(_word_piece_always, _nothing, _word_piece_stumbled, _renumber_dictionary),
    "BPE": Family(_bpe_always, _bpe_parts, _nothing, _bpe_renumber),
    "Unigram": Family(_unigram_always, _nothing, _nothing, _unigram_renumber),
    "WordLevel": Family(lambda section: _ids_where(section, lambda _: False), _nothing, _nothing, _renumber_dictionary),
}
"""By the name that ``tokenizer.json`` has for them."""
