"""Tokenizers that are trained on a few hundred words, beside tiny models that take their ids; what tests compare."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from exporter.artifact import Axis, Signature, TensorSpec
from exporter.encoders.text import TextEncoder
from exporter.preprocess import load_encoder
from exporter.tasks import get_task
from tests.models import WORDS

PLAIN = [word for word in WORDS if not word.startswith("#")]
UNSEEN = ["zyxomma qwrtz", "🙂👍🏽 ok", "北京 Москва עברית", "naïve—café\u200b", "", "\t\n", "¿" * 40, "a" * 300]
"""Texts of which no tokenizer here has seen anything like."""
_SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def sentences(count: int, seed: int = 0, words: list[str] | None = None) -> list[str]:
    """Random sentences of some English words."""
    random_words = random.Random(seed)
    return [" ".join(random_words.choices(words or PLAIN, k=random_words.randint(3, 9))) for _ in range(count)]


def byte_level(vocab_size: int = 500) -> Any:
    """Byte-level BPE as RoBERTa has it: ``<s> <pad> </s> <unk>`` first, ``<mask>`` last."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(400), trainer)
    tokenizer.add_special_tokens(["<mask>"])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    tokenizer.enable_padding(pad_id=1, pad_token="<pad>")
    return tokenizer


def byte_fallback() -> Any:
    """BPE over characters, with a token per byte for those it does not know, as SentencePiece makes it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*special, *bytes_], show_progress=False)
    tokenizer.train_from_iterator(sentences(400), trainer)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in special]  # bytes are none
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.post_processor = processors.Sequence(
        [processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])]
    )
    return tokenizer


def unigram() -> Any:
    """Unigram as XLM-R has it: ``<s> <pad> </s> <unk>`` first, ``<mask>`` last."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False, n_sub_iterations=1
    )
    tokenizer.train_from_iterator(sentences(400), trainer)
    tokenizer.add_special_tokens(["<mask>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


def write_model(folder: Path, kind: str, tokenizer: Any, *, spare: int = 3, **changes: Any) -> Path:
    """A tiny randomly initialised model of a class such as ``"RobertaForMaskedLM"`` beside a tokenizer.

    Args:
        folder: Where; made if missing.
        kind: Class in `transformers`.
        tokenizer: Its special tokens are ``<s> </s> <pad> <unk>``, and ``<mask>`` if it has that.
        spare: Rows of the embedding beyond the tokens.
        changes: Of the configuration.
    """
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"cls": "<s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>", "bos": "<s>", "eos": "</s>"}
    if tokenizer.token_to_id("<mask>") is not None:
        names["mask"] = "<mask>"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | {f"{key}_token": text for key, text in names.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    ids = {f"{key}_token_id": tokenizer.token_to_id(names[key]) for key in ("pad", "bos", "eos")}
    options = _SIZE | {"vocab_size": tokenizer.get_vocab_size() + spare, "max_position_embeddings": 514} | ids | changes
    model_class = getattr(transformers, kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class(model_class.config_class(**options)).eval().save_pretrained(folder)
    return folder


def open_model(folder: Path, kind: str) -> Any:
    """The folder's model, every weight of it from there."""
    import transformers

    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def served(folder: Path) -> TextEncoder:
    """The encoder that the pipeline makes of a folder."""
    names = ("input_ids", "attention_mask")
    axes = (Axis("batch", 1, 64), Axis("sequence", 1, 512))
    inputs = tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in names)
    outputs = (TensorSpec("out", "float32", ("batch",)),)
    encoder = load_encoder(folder, get_task("feature-extraction"), Signature(inputs, outputs, axes))
    assert isinstance(encoder, TextEncoder)
    return encoder


def run(model: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The model's first output."""
    import torch

    with torch.inference_mode():
        found: np.ndarray = model(**{name: torch.from_numpy(value) for name, value in inputs.items()})[0].numpy()
        return found


def strings(encoder: TextEncoder, texts: list[str]) -> list[list[str]]:
    return [list(encoder.tokenizer.encode(text).tokens) for text in texts]
