from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.errors import InternalError, PlanishError, RequestError
from exporter.original import open_original
from exporter.sources import resolve_source
from exporter.structure import save_checkpoint
from exporter.tasks import get_task
from pipelines.compress import tokenizer_cut, vocabulary
from pipelines.compress.vocabulary import cut_vocabulary
from tests.models import KINDS, make_model
from tests.pipelines.compress.vocabularies import (
    PLAIN,
    UNSEEN,
    byte_fallback,
    byte_level,
    open_model,
    run,
    sentences,
    served,
    strings,
    unigram,
    write_model,
)

Folders = Callable[..., Path]
FEW = PLAIN[:60]
TEXTS = [*sentences(40, seed=1, words=FEW), "The CITY, 1 mountain!", "a 🙂 b", ""]


def cut(folder: Path, kind: str, out: Path, texts: Any = TEXTS, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The cut model, written to `out` too, and the record."""
    model = open_model(folder, kind)
    record = cut_vocabulary(model, folder, out, texts, **options)
    save_checkpoint(model, out)
    return model, record


def same_outputs(folder: Path, kind: str, out: Path, record: dict[str, Any], texts: list[str]) -> None:
    """Outputs of the folder's model and of the cut one on padded batches are equal to the bit. Logits are those of the
    tokens that were kept, to rounding: a product with fewer columns may sum in another order."""
    before, after = served(folder), served(out)
    old, new = before.encode(texts), after.encode(texts)
    assert strings(before, texts) == strings(after, texts)
    expected, found = run(open_model(folder, kind), old), run(open_model(out, kind), new)
    if expected.shape[-1] != found.shape[-1]:
        assert expected.shape[-1] == record["rows_before"]
        expected = expected[..., kept_ids(before.tokenizer, after.tokenizer)]
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    else:
        np.testing.assert_array_equal(found, expected)


def kept_ids(before: Any, after: Any) -> list[int]:
    """Old ids in the order of the new ones."""
    names = {number: token for token, number in after.get_vocab(with_added_tokens=True).items()}
    assert sorted(names) == list(range(len(names)))
    old = [before.token_to_id(names[number]) for number in range(len(names))]
    assert old == sorted(old)
    return old


def loads_elsewhere(out: Path, texts: list[str], tokens: int) -> None:
    """`transformers` makes the same tokenizer of the folder, and nothing that texts hold is beyond the embedding."""
    from transformers import AutoTokenizer

    ours, theirs = served(out), AutoTokenizer.from_pretrained(out)
    assert len(theirs) == tokens
    for text in [*texts, *UNSEEN]:
        ids = ours.tokenizer.encode(text).ids
        assert theirs(text)["input_ids"] == ids
        assert max(ids, default=0) < tokens
    assert (theirs.pad_token_id, theirs.mask_token_id) == (ours.pad_id, ours.mask_id)


def test_the_real_model_gives_the_same_to_the_bit(minilm: str, tmp_path: Path) -> None:
    folder = resolve_source(minilm).path
    assert folder is not None
    texts = ["A man is playing a guitar.", "Ünïcode — naïve café 北京 🙂 don't", "Transformers outperform LSTMs", ""]
    _, record = cut(folder, "BertModel", tmp_path, texts)
    assert (record["tokens_before"], record["rows_before"]) == (30522, 30522)
    assert 1900 < record["tokens_after"] < 2100  # characters of many scripts are most of them
    assert record["parameters_removed"] == (30522 - record["tokens_after"]) * 384
    same_outputs(folder, "BertModel", tmp_path, record, texts)
    loads_elsewhere(tmp_path, texts, record["tokens_after"])
    tokenizer = served(tmp_path).tokenizer
    assert [tokenizer.token_to_id(token) for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [0, 1, 2, 3, 4]
    assert tokenizer.token_to_id("[unused0]") is None
    assert tokenizer.encode("guitars").tokens == ["[CLS]", "guitar", "##s", "[SEP]"]  # was a token of its own
    lines = (tmp_path / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert [tokenizer.token_to_id(line) for line in lines] == list(range(record["tokens_after"]))
    assert "tokenizer.json" in record["files"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("vit", "bert-dense", "bert-plain")])
def test_small_models_give_the_same_to_the_bit(model_folder: Folders, tmp_path: Path, kind: str) -> None:
    folder, model_class = model_folder(kind), KINDS[kind].model
    model, record = cut(folder, model_class, tmp_path)
    assert record["tokens_after"] < record["tokens_before"] <= record["rows_before"]
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == record["tokens_after"]
    same_outputs(folder, model_class, tmp_path, record, TEXTS)
    loads_elsewhere(tmp_path, TEXTS, record["tokens_after"])


BUILDERS = {
    "byte-level": (byte_level, "RobertaModel"),
    "byte-level language model": (byte_level, "RobertaForMaskedLM"),
    "byte fallback": (byte_fallback, "AlbertForMaskedLM"),
    "unigram": (unigram, "XLMRobertaModel"),
    "unigram language model": (unigram, "XLMRobertaForMaskedLM"),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_trained_tokenizers_of_every_kind(tmp_path: Path, name: str) -> None:
    make, kind = BUILDERS[name]
    folder, out = write_model(tmp_path / "model", kind, make()), tmp_path / "out"
    model, record = cut(folder, kind, out)
    assert record["rows_before"] == record["tokens_before"] + 3
    assert record["tokens_after"] < record["tokens_before"] - 30
    same_outputs(folder, kind, out, record, TEXTS)
    loads_elsewhere(out, TEXTS, record["tokens_after"])
    assert model.get_input_embeddings().padding_idx == model.config.pad_token_id == served(out).pad_id
    if make is not unigram:  # what has a token per byte loses nothing
        tokenizer = served(out).tokenizer
        for text in [text for text in UNSEEN if text.strip()]:
            assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_classes_of_transformers_that_build_tokenizers_themselves(tmp_path: Path) -> None:
    tokenizer = byte_level()
    folder, out = write_model(tmp_path / "model", "RobertaModel", tokenizer), tmp_path / "out"
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "RobertaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer.model.save(str(folder))
    _, record = cut(folder, "RobertaModel", out)
    assert {"vocab.json", "merges.txt"} <= set(record["files"])
    loads_elsewhere(out, TEXTS, record["tokens_after"])


def test_the_folder_opens_as_a_source(model_folder: Folders, tmp_path: Path) -> None:
    source = resolve_source(str(model_folder("bert")))
    assert source.path is not None
    out = tmp_path / "out"
    model = open_model(source.path, "BertModel")
    record = cut_vocabulary(model, source.path, out, TEXTS)
    taken = {*record["files"], *record["files_dropped"]}
    save_checkpoint(model, out, small_files=[(name, source.path / name) for name in source.files if name not in taken])
    task = get_task("feature-extraction")
    before, after = (open_original(resolve_source(str(folder)), task) for folder in (source.path, out))
    assert before.encoder is not None
    assert after.encoder is not None
    expected, found = (original.run(original.encoder.encode(TEXTS)) for original in (before, after))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


def test_rare_tokens_go_where_more_occurrences_are_asked_for(model_folder: Folders, tmp_path: Path) -> None:
    texts = ["river city"] * 3 + ["river music"]
    _, record = cut(model_folder("bert"), "BertModel", tmp_path, texts, min_count=2)
    tokenizer = served(tmp_path).tokenizer
    assert tokenizer.encode("river city").tokens[1:-1] == ["river", "city"]
    assert tokenizer.encode("music").tokens[1:-1] == ["m", "##u", "##s", "##i", "##c"]
    assert (record["tokens_per_text_before"], record["tokens_per_text"]) == (2, 3)
    assert record["unknown_share"] == 0


def test_pairs_and_prompts_are_encoded_as_when_served(model_folder: Folders, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder("bert"), tmp_path / "model")
    prompts = {"prompts": {"query": "question: "}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    cut(folder, "BertModel", tmp_path / "out", [("river", "music"), ["city", "old"]])
    tokenizer = served(tmp_path / "out").tokenizer
    for word in ("question", "river", "music", "city", "old"):
        assert tokenizer.encode(word).tokens[1:-1] == [word]
    assert tokenizer.encode("mountain").tokens[1:-1] != ["mountain"]


def test_unknown_words_stay_unknown(model_folder: Folders, tmp_path: Path) -> None:
    """``ab`` matches first, then ``##c`` is missing; without ``ab`` the word would be ``a ##bc``."""
    folder = shutil.copytree(model_folder("bert"), tmp_path / "model")
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = data["model"]["vocab"]
    for old, new in (("##c", "##qq"), ("river", "aβ"), ("city", "##βc")):
        vocab[new] = vocab.pop(old)
    data["normalizer"]["strip_accents"] = False
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    assert served(folder).tokenizer.encode("aβc xβc").tokens[1:-1] == ["[UNK]", "x", "##βc"]
    _, record = cut(folder, "BertModel", tmp_path / "out", ["aβc xβc"])
    assert served(tmp_path / "out").tokenizer.encode("aβc xβc").tokens[1:-1] == ["[UNK]", "x", "##βc"]
    assert record["kept_for"]["unknown_words"] == 1
    assert record["unknown_share"] == record["unknown_share_before"] == pytest.approx(1 / 3)


def test_a_text_that_comes_out_otherwise_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = replace(tokenizer_cut.FAMILIES["BPE"], parts=lambda section, ids: set())
    monkeypatch.setitem(tokenizer_cut.FAMILIES, "BPE", broken)
    folder = write_model(tmp_path / "model", "RobertaModel", byte_level())
    model = open_model(folder, "RobertaModel")
    rows = model.config.vocab_size
    with pytest.raises(InternalError, match=r"a text is split otherwise.*mountain"):
        cut_vocabulary(model, folder, tmp_path / "out", ["a", "mountain"])
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == rows
    assert not (tmp_path / "out").exists()


def test_of_many_texts_an_even_sample_is_checked(
    model_folder: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "MOST_CHECKED", 10)
    monkeypatch.setattr(vocabulary, "_CHUNK", 7)
    _, record = cut(model_folder("bert"), "BertModel", tmp_path, iter(TEXTS))
    assert (record["texts"], record["texts_checked"]) == (len(TEXTS), 10)


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no texts": ([], {}, "no texts"),
    "a number": ([1], {}, "neither a text nor a pair"),
    "three texts": ([("a", "b", "c")], {}, "neither a text nor a pair"),
    "half a character": (["a", "\ud83d"], {}, "cannot encode a text"),
    "no count": (["a"], {"min_count": 0}, "min_count must be"),
    "half a count": (["a"], {"min_count": 1.5}, "min_count must be"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests_are_refused(model_folder: Folders, tmp_path: Path, name: str) -> None:
    texts, options, message = WRONG[name]
    folder = model_folder("bert")
    with pytest.raises(RequestError, match=message) as caught:
        cut_vocabulary(open_model(folder, "BertModel"), folder, tmp_path / "out", texts, **options)
    assert caught.value.remedy
    assert not (tmp_path / "out").exists()


def test_the_source_is_not_overwritten(model_folder: Folders) -> None:
    folder = model_folder("bert")
    with pytest.raises(RequestError, match="would overwrite"):
        cut_vocabulary(open_model(folder, "BertModel"), folder, folder / ".", ["a"])


def test_models_that_do_not_fit_are_refused(model_folder: Folders, tmp_path: Path) -> None:
    from torch import nn

    folder = model_folder("bert")
    vision = open_model(model_folder("vit"), "ViTForImageClassification")
    for model in (vision, nn.Linear(2, 2)):
        with pytest.raises(PlanishError, match="takes no token ids"):
            cut_vocabulary(model, folder, tmp_path / "out", ["a"])
    small = make_model("bert", tmp_path / "small", changes={"vocab_size": 300})
    shutil.copy(folder / "tokenizer.json", small)
    rows = open_model(folder, "BertModel").config.vocab_size
    data = json.loads((small / "tokenizer.json").read_text(encoding="utf-8"))
    data["model"]["vocab"]["##more"] = rows  # one more than rows
    (small / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(RequestError, match="fewer embeddings than its tokenizer has tokens"):
        cut_vocabulary(open_model(folder, "BertModel"), small, tmp_path / "out", ["a"])
