from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import RequestError
from pipelines.compress.tokenizer_cut import cut_tokenizer
from pipelines.compress.tokenizer_files import check_names, write_files

VOCAB = {
    token: number for number, token in enumerate(["[PAD]", "[unused]", "[UNK]", "a", "old", "new", "##s", "[CLS]"])
}
TOKENS = {number: token for token, number in VOCAB.items()} | {8: "<more>"}
MAPPING = {number: new for new, number in enumerate([0, 2, 3, 5, 7, 8])}
DATA: dict[str, Any] = {
    "added_tokens": [{"id": 8, "content": "<more>"}],
    "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "vocab": VOCAB},
}


def put(folder: Path, **files: Any) -> None:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def test_files_beside_the_tokenizer_follow(tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = {"content": "<more>", "lstrip": False, "special": False}
    put(
        tmp_path,
        tokenizer_config={
            "added_tokens_decoder": {"0": {"content": "[PAD]"}, "8": more},
            "pad_token": "[PAD]",
            "pad_token_id": 0,
            "pad_token_type_id": 1,
            "model_max_length": 7,
            "sep_token": None,
        },
        special_tokens_map={"cls_token": {"content": "[CLS]"}, "additional_special_tokens": ["old"]},
        added_tokens={"<more>": 8},
        generation_config={"eos_token_id": [5, 7], "pad_token_id": 99, "max_length": 5},
        config={"pad_token_id": 0},
    )
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB))
    (tmp_path / "merges.txt").write_text("a b\n")
    for name in ("spiece.model", "sentencepiece.bpe.model", "dict.txt", "model.safetensors", "README.md"):
        (tmp_path / name).write_bytes(b"\0")
    assert check_names(tmp_path, TOKENS) == {0, 4, 5, 7, 8}

    written, dropped = write_files(tmp_path, out, cut_tokenizer(DATA, MAPPING), "WordPiece", MAPPING)
    assert sorted(written) == sorted(path.name for path in out.iterdir())
    assert set(dropped) == {"spiece.model", "sentencepiece.bpe.model", "dict.txt", "merges.txt"}
    assert all(dropped.values())
    assert (out / "vocab.txt").read_text().splitlines() == ["[PAD]", "[UNK]", "a", "new", "[CLS]"]
    settings = read(out, "tokenizer_config")
    assert settings["added_tokens_decoder"] == {"0": {"content": "[PAD]"}, "5": more}
    kept = ("pad_token_id", "pad_token_type_id", "model_max_length", "sep_token")
    assert [settings[key] for key in kept] == [0, 1, 7, None]
    assert read(out, "added_tokens") == {"<more>": 5}
    assert read(out, "special_tokens_map") == read(tmp_path, "special_tokens_map")
    assert read(out, "generation_config") == {"eos_token_id": [3, 4], "pad_token_id": None, "max_length": 5}
    assert read(out, "tokenizer")["added_tokens"] == [{"id": 5, "content": "<more>"}]


def test_merges_are_written_as_they_were(tmp_path: Path) -> None:
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4}
    model = {"type": "BPE", "vocab": vocab, "merges": [["b", "c"], ["a", "b"]]}
    (tmp_path / "vocab.json").write_text("{}")
    for head in ("#version: 0.2\n", ""):
        (tmp_path / "merges.txt").write_text(f"{head}b c\na b\n")
        mapping = {0: 0, 1: 1, 2: 2, 3: 3}
        write_files(tmp_path, tmp_path / "out", cut_tokenizer({"model": model}, mapping), "BPE", mapping)
        assert (tmp_path / "out" / "merges.txt").read_text() == f"{head}a b\n"
    assert read(tmp_path / "out", "vocab") == {"a": 0, "b": 1, "c": 2, "ab": 3}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens": {"<other>": 8}}, r"added_tokens\.json and tokenizer\.json disagree.*is not there"),
        ({"added_tokens": {"<more>": 9}}, r"disagree.*'<more>' with id 9 has id 8 there"),
        ({"tokenizer_config": {"added_tokens_decoder": {"3": {"content": "[CLS]"}}}}, "has id 7 there"),
    ],
)
def test_files_that_disagree_are_refused(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    put(tmp_path, **files)
    with pytest.raises(RequestError, match=message):
        check_names(tmp_path, TOKENS)


def test_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text("{")
    with pytest.raises(RequestError, match=r"special_tokens_map\.json is not valid JSON"):
        check_names(tmp_path, TOKENS)
