"""Vocabulary pruning: a tokenizer and the embedding of its model cut down to the tokens that some texts need.

A multilingual or general vocabulary is often most of a small encoder's weights (A. Abdaoui et al., "Load What You Need:
Smaller Versions of Multilingual BERT", SustaiNLP 2020), and its rows for tokens that never occur do nothing. Other than
there, texts outside of the data can still be encoded, and texts of the data give the same outputs to the bit
(logits of a language model's head to rounding: a matrix product with fewer columns may sum in another order).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.encoders.text import TextEncoder
from exporter.errors import InternalError, RequestError, first_line
from pipelines.compress.embedding_cut import cut_rows, needed_ids, token_embedding
from pipelines.compress.tokenizer_cut import (
    Family,
    Section,
    cut_tokenizer,
    family_of,
    named_ids,
    read_tokenizer_file,
    tokens_of,
)
from pipelines.compress.tokenizer_files import check_names, write_files

Text = str | tuple[str, str]
MOST_CHECKED = 20_000
"""Of more texts than these, an even sample is compared before and after."""
_CHUNK = 1000


def cut_vocabulary(
    model: Any, source_folder: Path, out: Path, texts: Iterable[Text], *, min_count: int = 1
) -> dict[str, Any]:
    """Cut a model's vocabulary down to what texts need; special, added and single-character tokens stay in any case.

    The kept tokens are numbered anew, in their old order. With a `min_count` of 1 it is checked that each text (an even
    sample of `MOST_CHECKED`, where there are more) is split into the same tokens as before, so that the model's outputs
    on it are the same too. Nothing is written or changed before all checks have passed.

    Args:
        model: A `transformers` model that takes token ids, changed in place: embedding, (tied) language-modelling head
            with its bias, configuration. Write it with `exporter.structure.save_checkpoint`.
        source_folder: Its folder, with ``tokenizer.json``; texts get its sentence-transformers prompt, as when serving.
        out: Another folder, made if missing: gets the new tokenizer files. Do not copy those in the record's
            ``files`` and ``files_dropped`` over from the source.
        texts: Texts or pairs of texts, such as the model will see. They are not cut to its longest sequence.
        min_count: Tokens that occur less often in all the texts go too; what has them is split into smaller pieces.

    Returns:
        For reports: ``tokens_before``, ``tokens_after``, ``rows_before`` (of the embedding; it may have had some to
        spare, now it has ``tokens_after``), ``kept_for`` (tokens by the reason that was found first), ``texts``,
        ``texts_checked``, ``min_count``, ``tokenizer`` (its kind), ``parameters_removed``; of the checked texts,
        special tokens not counted: ``tokens_per_text_before``, ``tokens_per_text``, ``unknown_share_before``,
        ``unknown_share``; ``ids_without_token`` (by key, ids in the configuration that were no token's: now ``None``),
        ``files`` (written) and ``files_dropped`` (why each old file has no successor).

    Raises:
        RequestError: There is no ``tokenizer.json``, it is of an unknown kind, it disagrees with other files or has
            more tokens than the model has embeddings, the model takes no token ids, or there are no (sound) texts.
        InternalError: A text is split otherwise than before; names the first.
    """
    given = _checked_texts(texts)
    if type(min_count) is not int or min_count < 1:
        raise RequestError("min_count must be a whole number of at least 1", repr(min_count), "1 keeps all that occurs")
    if out.resolve() == source_folder.resolve():
        raise RequestError("the new tokenizer would overwrite the old one", out, "Give another folder")
    data = read_tokenizer_file(source_folder)
    kind, family = family_of(data)
    tokens = tokens_of(data)
    rows = token_embedding(model, max(tokens) + 1).weight.shape[0]
    named = named_ids(data) | check_names(source_folder, tokens) | needed_ids(model, tokens)
    if strange := sorted(named - tokens.keys()):
        raise RequestError("tokenizer.json names ids that none of its tokens has", strange, "Copy or download it again")

    encoder = TextEncoder.load(source_folder, inputs=("input_ids",))
    prepared = [_prepare(encoder, text) for text in given]
    unknown = _unknown_id(data["model"], tokens)
    counts, words = _count(encoder.tokenizer, prepared, unknown)
    reasons = _reasons(data["model"], family, named, counts, words, min_count)
    mapping = {number: new for new, number in enumerate(sorted(set().union(*reasons.values())))}

    new_data = cut_tokenizer(data, mapping)
    after = _open(new_data)
    if moved := [tokens[old] for old, new in mapping.items() if after.token_to_id(tokens[old]) != new]:
        remedy = "Its added tokens must follow its vocabulary without gaps"
        raise RequestError("tokens of tokenizer.json do not get the ids that it gives them", moved[:5], remedy)
    seen = _compare(encoder.tokenizer, after, prepared, mapping, unknown, exact=min_count == 1)

    files, dropped = write_files(source_folder, out, new_data, kind, mapping)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lost = cut_rows(model, mapping)
    return {
        "tokenizer": kind,
        "tokens_before": len(tokens),
        "tokens_after": len(mapping),
        "rows_before": rows,
        "kept_for": {reason: len(ids) for reason, ids in reasons.items()},
        "parameters_removed": parameters - sum(parameter.numel() for parameter in model.parameters()),
        "texts": len(given),
        "min_count": min_count,
        **seen.to_dict(),
        "ids_without_token": lost,
        "files": files,
        "files_dropped": dropped,
    }


@dataclass
class _Seen:
    """Sums over the texts that were compared."""

    texts: int = 0
    tokens: Counter[str] = field(default_factory=Counter)

    def add(self, when: str, item: Any, unknown: int | None) -> None:
        ids = _own_ids(item)
        self.tokens[when] += len(ids)
        self.tokens[f"unknown {when}"] += ids.count(unknown) if unknown is not None else 0

    def to_dict(self) -> dict[str, Any]:
        def share(when: str) -> float:
            return self.tokens[f"unknown {when}"] / max(1, self.tokens[when])

        return {
            "texts_checked": self.texts,
            "tokens_per_text_before": self.tokens["before"] / self.texts,
            "tokens_per_text": self.tokens["after"] / self.texts,
            "unknown_share_before": share("before"),
            "unknown_share": share("after"),
        }


def _checked_texts(texts: Iterable[Text]) -> list[Text]:
    given: list[Text] = []
    for text in [texts] if isinstance(texts, str) else texts:
        pair = isinstance(text, list | tuple) and len(text) == 2 and all(isinstance(part, str) for part in text)
        if not isinstance(text, str) and not pair:
            raise RequestError("neither a text nor a pair of texts", repr(text)[:60], f"Text {len(given)} must be one")
        given.append(text if isinstance(text, str) else (text[0], text[1]))
    if not given:
        raise RequestError("there are no texts to say which tokens are needed", "[]", "Give those the model is for")
    return given


def _prepare(encoder: TextEncoder, text: Text) -> Text:
    """The text as it is encoded when the model is served."""
    first, *second = (text,) if isinstance(text, str) else text
    parts = [f"{encoder.prefix}{first}", *second]
    if encoder.lower_case:
        parts = [part.lower() for part in parts]
    return parts[0] if isinstance(text, str) else (parts[0], parts[1])


def _unknown_id(section: Section, tokens: Mapping[int, str]) -> int | None:
    if section.get("unk_id") is not None:
        return int(section["unk_id"])
    unknown = section.get("unk_token")
    return next((number for number, token in tokens.items() if token == unknown), None)


def _encode(tokenizer: Any, texts: Sequence[Text]) -> Iterator[tuple[Text, Any]]:
    for start in range(0, len(texts), _CHUNK):
        chunk = list(texts[start : start + _CHUNK])
        try:
            items = tokenizer.encode_batch(chunk)
        except Exception as error:  # the library raises bare Exception
            where = f"one of the texts {start} to {start + len(chunk) - 1} ({first_line(error)})"
            raise RequestError("the tokenizer cannot encode a text", where, "Leave it out") from error
        yield from zip(chunk, items, strict=True)


def _own_ids(item: Any) -> list[int]:
    """The text's own tokens, without those that are put around it."""
    return [number for number, special in zip(item.ids, item.special_tokens_mask, strict=True) if not special]


def _count(tokenizer: Any, texts: Sequence[Text], unknown: int | None) -> tuple[Counter[int], set[str]]:
    """How often each token occurs, and the words that end as unknown, as the tokenizer's model sees them."""
    counts: Counter[int] = Counter()
    spans: set[str] = set()
    for text, item in _encode(tokenizer, texts):
        counts.update(item.ids)
        if unknown is not None and unknown in item.ids:
            parts = (text,) if isinstance(text, str) else text
            for number, place, which in zip(item.ids, item.offsets, item.sequence_ids, strict=True):
                if number == unknown and which is not None:
                    spans.add(parts[which][slice(*place)])
    words: set[str] = set()
    for span in spans:
        plain = span if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(span)
        split = [] if tokenizer.pre_tokenizer is None else tokenizer.pre_tokenizer.pre_tokenize_str(plain)
        words.update(word for word, _ in split)
        words.add(plain)
    return counts, words


def _reasons(
    section: Section, family: Family, named: set[int], counts: Counter[int], words: set[str], min_count: int
) -> dict[str, set[int]]:
    """The ids that stay, each under the first reason for it."""
    found = {
        "special": named,
        "texts": {number for number, count in counts.items() if count >= min_count},
        "spelling": family.always(section),
        "unknown_words": family.stumbled(section, words) if min_count == 1 else set(),
    }
    found["parts"] = family.parts(section, set().union(*found.values()))
    taken: set[int] = set()
    for reason, ids in found.items():
        found[reason] = ids - taken
        taken |= ids
    return found


def _open(data: Mapping[str, Any]) -> Any:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(json.dumps(data))
    except Exception as error:  # the library raises bare Exception
        raise InternalError("the cut tokenizer does not open", first_line(error), "Report it") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _compare(
    before: Any,
    after: Any,
    texts: Sequence[Text],
    mapping: Mapping[int, int],
    unknown: int | None,
    *,
    exact: bool,
) -> _Seen:
    """Encode the texts with both tokenizers; where the result must be the same, see that it is."""
    count = min(len(texts), MOST_CHECKED)
    sample = [texts[number * len(texts) // count] for number in range(count)]
    seen = _Seen(texts=count)
    for (text, old), (_, new) in zip(_encode(before, sample), _encode(after, sample), strict=True):
        if exact and [mapping.get(number) for number in old.ids] != new.ids:
            remedy = f"It was {old.tokens[:20]} and is {new.tokens[:20]}; report it with the tokenizer"
            raise InternalError("a text is split otherwise after its vocabulary was cut", repr(text)[:200], remedy)
        seen.add("before", old, unknown)
        seen.add("after", new, None if unknown is None else mapping[unknown])
    return seen
