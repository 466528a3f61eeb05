"""Texts to token ids, over the `tokenizers` library alone."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import RequestError

Array = np.ndarray
_NO_LIMIT = 1_000_000
# A tokenizer keeps what it cuts to as a setting of its own, and encoders of other threads may share it.
_SETTINGS = threading.RLock()


@dataclass(frozen=True)
class Encoded:
    """Token ids with what is needed to find the way back to the texts.

    Attributes:
        inputs: Model inputs, int64, (batch, sequence).
        offsets: int64, (batch, sequence, 2): where each token begins and ends in its text, in characters.
        sequence_ids: int64, (batch, sequence): 0 for the first text, 1 for the second, -1 for neither.
        word_ids: int64, (batch, sequence): index of the word that a token belongs to, -1 for none.
    """

    inputs: dict[str, Array]
    offsets: Array
    sequence_ids: Array
    word_ids: Array


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer with the settings of its model.

    Attributes:
        tokenizer: A `tokenizers.Tokenizer` without padding of its own.
        inputs: Names of the inputs to make, among ``input_ids``, ``attention_mask``, ``token_type_ids``.
        pad_id: Token id of padding; ``None`` where the folder names none.
        pad_type_id: Token type of padding.
        max_length: Longest sequence, in tokens, special ones included; longer texts are cut.
        pad_side: ``"right"`` or ``"left"``.
        truncation: ``"longest_first"`` or ``"only_second"``.
        cut_side: ``"right"`` or ``"left"``: the end at which a text that is too long loses tokens.
        prefix: Put before every text (a sentence-transformers default prompt).
        lower_case: Texts are lower-cased first (a sentence-transformers setting).
        mask_token: The text of the mask token, if there is one.
        mask_id: Its id.
    """

    tokenizer: Any
    inputs: tuple[str, ...]
    pad_id: int | None
    max_length: int
    pad_type_id: int = 0
    pad_side: str = "right"
    truncation: str = "longest_first"
    cut_side: str = "right"
    prefix: str = ""
    lower_case: bool = False
    mask_token: str | None = None
    mask_id: int | None = None

    @classmethod
    def load(
        cls, folder: Path, *, inputs: tuple[str, ...], limit: int | None = None, truncation: str = "longest_first"
    ) -> TextEncoder:
        """Read the tokenizer of a model folder.

        Args:
            folder: Holds ``tokenizer.json``; where it holds another form of tokenizer, `transformers` converts it.
            inputs: The model's inputs.
            limit: Longest sequence that the model takes; the folder's own limits may be lower.
            truncation: What is cut from a pair that is too long.

        Raises:
            RequestError: There is no tokenizer, or it does not parse.
        """
        tokenizer = _read_tokenizer(folder)
        settings = _read(folder, "tokenizer_config.json")
        special = {**_read(folder, "special_tokens_map.json"), **{k: v for k, v in settings.items() if v is not None}}
        sentence = _read(folder, "sentence_bert_config.json")
        model = _read(folder, "config.json")
        prompts = _read(folder, "config_sentence_transformers.json")
        padding, cutting = tokenizer.padding or {}, tokenizer.truncation or {}
        limits = (limit, settings.get("model_max_length"), sentence.get("max_seq_length"))
        known = [int(value) for value in limits if isinstance(value, int | float) and 0 < value < _NO_LIMIT]
        pad_id = _token_id(tokenizer, special.get("pad_token"), padding.get("pad_id"), model.get("pad_token_id"))
        mask_token = _token_text(special.get("mask_token"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return cls(
            tokenizer=tokenizer,
            inputs=tuple(name for name in inputs if name in _MAKERS),
            pad_id=pad_id,
            max_length=min(known) if known else _NO_LIMIT,
            pad_type_id=int(padding.get("pad_type_id", settings.get("pad_token_type_id", 0)) or 0),
            pad_side=str(settings.get("padding_side") or padding.get("direction") or "right"),
            truncation=truncation,
            cut_side=str(settings.get("truncation_side") or cutting.get("direction") or "right").lower(),
            prefix=str((prompts.get("prompts") or {}).get(prompts.get("default_prompt_name"), "") or ""),
            lower_case=bool(sentence.get("do_lower_case", False)),
            mask_token=mask_token,
            mask_id=None if mask_token is None else tokenizer.token_to_id(mask_token),
        )

    def save(self, folder: Path) -> Path:
        """Write ``tokenizer.json``, so that another process needs nothing but `tokenizers`."""
        path = folder / "tokenizer.json"
        with _SETTINGS:
            self.tokenizer.no_truncation()
            self.tokenizer.save(str(path))
        return path

    def padded(self, side: str) -> TextEncoder:
        """The same encoder, padding on another side."""
        return replace(self, pad_side=side)

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, pad_to: int | None = None
    ) -> dict[str, Array]:
        """Texts, or pairs of texts, as model inputs.

        Args:
            texts: At least one.
            pairs: The second text of each, as many as `texts`.
            pad_to: Length to pad to (texts are cut to it, too); default: the longest of the batch.

        Returns:
            By input name, int64, (batch, sequence).
        """
        return self.encode_with_offsets(texts, pairs, pad_to=pad_to).inputs

    def encode_with_offsets(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, pad_to: int | None = None
    ) -> Encoded:
        """`encode` with character offsets, for answers that are spans of the text."""
        if isinstance(texts, str):
            raise RequestError("texts must be a list of texts", repr(texts)[:60], "Put it into a list")
        first = [self._prepare(text) for text in texts]
        if pairs is None:
            return self._encode(first, pad_to, pretokenized=False, pair=False)
        if len(pairs) != len(first):
            raise RequestError("there must be as many second texts as first ones", f"{len(pairs)} and {len(first)}")
        second = [text.lower() if self.lower_case else text for text in pairs]
        return self._encode(list(zip(first, second, strict=True)), pad_to, pretokenized=False, pair=True)

    def encode_words(self, sentences: Sequence[Sequence[str]], *, pad_to: int | None = None) -> Encoded:
        """Sentences that are split into words already, for labels that belong to words."""
        return self._encode([list(words) for words in sentences], pad_to, pretokenized=True, pair=False)

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens per text, special ones included, nothing cut."""
        prepared = [self._prepare(text) for text in texts]
        with _SETTINGS:
            return [len(item.ids) for item in self._cut(prepared, _NO_LIMIT, False, "longest_first")]

    def _prepare(self, text: str) -> str:
        if not isinstance(text, str):
            raise RequestError("a text is no string", repr(text)[:60], "Give texts")
        text = f"{self.prefix}{text}"
        return text.lower() if self.lower_case else text

    def _encode(self, batch: list[Any], pad_to: int | None, *, pretokenized: bool, pair: bool) -> Encoded:
        if not batch:
            raise RequestError("there is no text to encode", "[]", "Give at least one")
        if pad_to is not None and pad_to > self.max_length:
            raise RequestError("the length to pad to is beyond the limit", pad_to, f"It is {self.max_length} tokens")
        longest = self.max_length if pad_to is None else pad_to
        special = self.tokenizer.num_special_tokens_to_add(pair)
        if longest <= special:
            raise RequestError("no room is left for the text", longest, f"Special tokens alone take {special}")
        items = self._tokenize(batch, longest, pretokenized, self.truncation if pair else "longest_first")
        return self._pad(items, pad_to)

    def _tokenize(self, batch: list[Any], longest: int, pretokenized: bool, strategy: str) -> list[Any]:
        with _SETTINGS:
            try:
                return self._cut(batch, longest, pretokenized, strategy)
            except Exception:  # the library raises bare Exception where cutting the second text is not enough
                if strategy != "only_second":
                    raise
            if len(batch) == 1:
                return self._cut(batch, longest, pretokenized, "longest_first")
            # One by one, so that what comes of a text does not depend on the texts beside it.
            return [self._tokenize([item], longest, pretokenized, strategy)[0] for item in batch]

    def _cut(self, batch: list[Any], longest: int, pretokenized: bool, strategy: str) -> list[Any]:
        if longest < _NO_LIMIT:
            self.tokenizer.enable_truncation(longest, strategy=strategy, direction=self.cut_side)
        else:
            self.tokenizer.no_truncation()
        items: list[Any] = self.tokenizer.encode_batch(batch, is_pretokenized=pretokenized)
        return items

    def _pad(self, items: list[Any], pad_to: int | None) -> Encoded:
        length = max(len(item.ids) for item in items) if pad_to is None else pad_to
        if self.pad_id is None and any(len(item.ids) != length for item in items):
            raise RequestError("the tokenizer has no padding token", "texts of different lengths", "Encode them singly")
        shape = (len(items), length)
        columns = {
            "input_ids": np.full(shape, self.pad_id or 0, np.int64),
            "attention_mask": np.zeros(shape, np.int64),
            "token_type_ids": np.full(shape, self.pad_type_id, np.int64),
        }
        offsets = np.zeros((*shape, 2), np.int64)
        sequences, words = np.full(shape, -1, np.int64), np.full(shape, -1, np.int64)
        for row, item in enumerate(items):
            count = len(item.ids)
            place = slice(length - count, length) if self.pad_side == "left" else slice(0, count)
            for name, make in _MAKERS.items():
                columns[name][row, place] = make(item)
            offsets[row, place] = np.asarray(item.offsets, np.int64).reshape(-1, 2)
            sequences[row, place] = [-1 if value is None else value for value in item.sequence_ids]
            words[row, place] = [-1 if value is None else value for value in item.word_ids]
        return Encoded({name: columns[name] for name in self.inputs}, offsets, sequences, words)


_MAKERS: dict[str, Any] = {
    "input_ids": lambda item: item.ids,
    "attention_mask": lambda item: item.attention_mask,
    "token_type_ids": lambda item: item.type_ids,
}


def _read_tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        return _convert_tokenizer(folder)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise RequestError("tokenizer.json is broken", f"{path} ({error})", "Copy or download it again") from error


def _convert_tokenizer(folder: Path) -> Any:
    """A `tokenizers` tokenizer from the older forms (``vocab.txt``, ``spiece.model`` …)."""
    from tokenizers import Tokenizer

    forms = ("vocab.txt", "vocab.json", "spiece.model", "spm.model", "sentencepiece.bpe.model", "tokenizer.model")
    if not any((folder / name).is_file() for name in forms):
        raise RequestError("the folder has no tokenizer", folder, "Expected tokenizer.json")
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder, use_fast=True, local_files_only=True)
        return Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    except Exception as error:  # conversion code raises anything on what it does not know
        lines = str(error).strip().splitlines() or ["no message"]
        raise RequestError(
            "the tokenizer cannot be converted", f"{folder} ({lines[0]})", "Add tokenizer.json to the folder"
        ) from error


def _read(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(f"{name} is not valid JSON ({error})", path, "Copy or download it again") from error
    return found if isinstance(found, dict) else {}


def _token_text(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _token_id(tokenizer: Any, token: Any, *fallbacks: Any) -> int | None:
    text = _token_text(token)
    found = None if text is None else tokenizer.token_to_id(text)
    return next((int(value) for value in (found, *fallbacks) if isinstance(value, int)), None)
