from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from exporter.errors import RequestError
from pipelines.compress.tokenizer_cut import (
    cut_tokenizer,
    family_of,
    named_ids,
    read_tokenizer_file,
    tokens_of,
)
from tests.pipelines.compress.vocabularies import PLAIN, byte_fallback, byte_level, sentences, unigram


def content(tokenizer: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tokenizer.to_str())
    return found


def cut(data: dict[str, Any], texts: list[str]) -> tuple[Any, Any, dict[int, int]]:
    """The tokenizer before, the one that is cut to some texts, and the mapping."""
    _, family = family_of(data)
    before = Tokenizer.from_str(json.dumps(data))
    used = {number for text in texts for number in before.encode(text).ids}
    kept = used | family.always(data["model"]) | named_ids(data)
    kept |= family.parts(data["model"], kept)
    mapping = {number: new for new, number in enumerate(sorted(kept))}
    return before, Tokenizer.from_str(json.dumps(cut_tokenizer(data, mapping))), mapping


def test_merges_on_the_way_to_each_token_stay() -> None:
    data = content(byte_level())
    texts = sentences(30, seed=2, words=PLAIN[40:80])
    before, after, mapping = cut(data, texts)
    assert len(mapping) < before.get_vocab_size() - 50
    for text in texts:
        assert after.encode(text).tokens == before.encode(text).tokens
    new = content(after)["model"]
    assert 0 < len(new["merges"]) < len(data["model"]["merges"])
    assert {first + second for first, second in new["merges"]} <= new["vocab"].keys()
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= new["vocab"].keys()
    assert content(after)["pre_tokenizer"] == data["pre_tokenizer"]


@pytest.mark.parametrize("make", [byte_level, byte_fallback, unigram])
def test_ids_around_texts_follow(make: Any) -> None:
    data = content(make())
    before, after, mapping = cut(data, ["old"])
    assert after.encode("old").tokens == before.encode("old").tokens
    assert after.encode("old").ids == [mapping[number] for number in before.encode("old").ids]
    assert after.encode("北").ids == [mapping[number] for number in before.encode("北").ids]
    assert list(mapping.values()) == list(range(len(mapping)))
    assert after.get_vocab_size() == len(mapping)
    assert after.padding == before.padding
    for token in ("<s>", "<pad>", "</s>", "<unk>"):
        assert after.token_to_id(token) == mapping[before.token_to_id(token)]


def test_every_place_that_names_ids_is_renumbered() -> None:
    """Padding and special tokens at the end, so that all their ids change."""
    vocab = {
        **{word: number for number, word in enumerate(PLAIN)},
        "[UNK]": 900,
        "[CLS]": 901,
        "[SEP]": 902,
        "[P]": 903,
    }
    processors: list[dict[str, Any]] = [
        {"type": "BertProcessing", "sep": ["[SEP]", 902], "cls": ["[CLS]", 901]},
        {"type": "RobertaProcessing", "sep": ["[SEP]", 902], "cls": ["[CLS]", 901], "trim_offsets": True,
         "add_prefix_space": False},
    ]  # fmt: skip
    for processor in [*processors, {"type": "Sequence", "processors": processors[:1]}]:
        data = content(Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))) | {
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": processor,
            "padding": {"strategy": {"Fixed": 6}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 903,
                        "pad_type_id": 0, "pad_token": "[P]"},
        }  # fmt: skip
        assert named_ids(data) == {901, 902, 903}
        before, after, mapping = cut(data, ["river city"])
        assert before.encode("river zzz").ids == [901, vocab["river"], 900, 902, 903, 903]
        assert after.encode("river zzz").ids == [
            3,
            sorted((vocab["river"], vocab["city"])).index(vocab["river"]),
            2,
            4,
            5,
            5,
        ]
        assert len(mapping) == 6
        assert data["padding"]["pad_id"] == 903  # it is left as it is


def test_the_least_score_stays_because_unknowns_cost_ten_more() -> None:
    """Without ``zz`` an unknown character would cost 25, not 40, and ``☃ab cd`` lose against it and ``abcd``."""
    pieces = [
        ("<unk>", 0.0),
        *((c, -20.0) for c in "abcd"),
        ("☃ab", -15.0),
        ("cd", -15.0),
        ("abcd", -3.0),
        ("zz", -30.0),
    ]
    data = content(Tokenizer(models.Unigram([*pieces, ("dd", -19.0)], 0, False)))
    before, after, mapping = cut(data, ["☃abcd", "abcd"])
    assert before.encode("☃abcd").tokens == after.encode("☃abcd").tokens == ["☃ab", "cd"]
    assert before.encode("abcd").tokens == ["abcd"]
    assert 8 in mapping
    assert after.token_to_id("dd") is None


def test_prefixes_and_suffixes_of_merges() -> None:
    """Pieces within words begin with a prefix, those at the end have a suffix, as CLIP's and older tokenizers' do."""
    vocab: dict[str, int] = {}
    merges = [("l", "##o"), ("##w", "##e"), ("lo", "##we"), ("##e", "##r</w>"), ("lo", "##w</w>"), ("##we", "##r</w>")]
    for token in ["l", "##o", "##w", "##e", "##r", "##r</w>", "##w</w>", "##o</w>", "lo", "##we", "lowe", "##er</w>",
                  "low</w>", "##wer</w>"]:  # fmt: skip
        vocab[token] = len(vocab)
    for prefix in ("##", ""):
        bare = {(prefix + token[2:] if token.startswith("##") else token): number for token, number in vocab.items()}
        pairs = [tuple(prefix + part[2:] if part.startswith("##") else part for part in merge) for merge in merges]
        known = [pair for pair in pairs if pair[0] + pair[1].removeprefix(prefix) in bare]
        options: dict[str, Any] = {"continuing_subword_prefix": prefix} if prefix else {}
        ids = {token: number for number, token in enumerate(dict.fromkeys(bare))}
        data = content(Tokenizer(models.BPE(ids, known, end_of_word_suffix="</w>", **options)))
        data["pre_tokenizer"] = {"type": "Whitespace"}
        for text in ("low", "lower", "lowe lo"):
            before, after, _ = cut(data, [text])
            assert after.encode(text).tokens == before.encode(text).tokens
        before, after, mapping = cut(data, ["low"])
        assert len(mapping) < len(ids)


def test_words_taken_whole_need_no_merges() -> None:
    vocab = {token: number for number, token in enumerate(["a", "b", "c", "ab", "abc", "cab", "bc"])}
    data = content(Tokenizer(models.BPE(vocab, [("b", "c"), ("a", "b"), ("a", "bc")], ignore_merges=True)))
    before, after, mapping = cut(data, ["cab"])
    assert before.encode("cab").tokens == after.encode("cab").tokens == ["cab"]
    assert set(mapping) == {0, 1, 2, 5}
    data["model"]["merges"] = [" ".join(merge) for merge in data["model"]["merges"]]  # as in older files
    before, after, mapping = cut(data, ["abc"])
    assert after.encode("abc").tokens == before.encode("abc").tokens == ["abc"]
    assert content(after)["model"]["merges"] == [["b", "c"], ["a", "bc"]]


def test_single_characters_stay() -> None:
    vocab = {"[UNK]": 0, "a": 1, "##a": 2, "ab": 3, "##ab": 4, "é": 5, "##é": 6, "##": 7, "北": 8, "xyz": 9}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFC(), pre_tokenizers.Whitespace()
    _, after, mapping = cut(content(tokenizer), ["xyz"])
    assert set(mapping) == {0, 1, 2, 5, 6, 8, 9}
    assert after.encode("aéa é 北 ab").tokens == ["a", "##é", "##a", "é", "北", "[UNK]"]


def test_files_that_do_not_say_their_kind() -> None:
    for tokenizer, name in ((byte_level(), "BPE"), (unigram(), "Unigram")):
        data = content(tokenizer)
        del data["model"]["type"]
        assert family_of(data)[0] == name
    vocab = {"[UNK]": 0}
    for model, name in ((models.WordPiece(vocab), "WordPiece"), (models.WordLevel(vocab, "[UNK]"), "WordLevel")):
        data = content(Tokenizer(model))
        del data["model"]["type"]
        assert family_of(data)[0] == name


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"only a vocabulary in tokenizer\.json.*save_pretrained"):
        read_tokenizer_file(tmp_path)
    path = tmp_path / "tokenizer.json"
    for text in ("{", "[]", '{"model": 1}', '{"model": {"vocab": 1}}'):
        path.write_text(text)
        with pytest.raises(RequestError, match=r"tokenizer\.json"):
            read_tokenizer_file(tmp_path)
    with pytest.raises(RequestError, match=r"Gadget.*BPE, Unigram, WordLevel, WordPiece"):
        family_of({"model": {"type": "Gadget", "vocab": {}}})
    data = content(byte_level())
    data["model"]["dropout"] = 0.1
    with pytest.raises(RequestError, match=r"at random: dropout 0\.1"):
        family_of(data)


def test_tokens_keep_their_order() -> None:
    data = content(byte_level())
    _, after, mapping = cut(data, sentences(5))
    tokens = tokens_of(data)
    assert all(first < second for first, second in pairwise(mapping))
    assert [after.id_to_token(new) for new in mapping.values()] == [tokens[old] for old in mapping]
