"""Hugging Face folders as originals: loading, the flat forward function, limits and ranges of the inputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from exporter.artifact import Axis, InputContract, TensorSpec
from exporter.errors import RequestError
from exporter.original.base import DEFAULT_MAX_LENGTH, NO_LIMIT, POSITION_KEYS, Original
from exporter.original.pooling import SentenceHead, load_sentence_head
from exporter.original.shapes import sign_forward, signature_of
from exporter.sources.source import Source
from exporter.structure import apply_structure, input_embedding, load_state, read_state
from exporter.structure.checkpoint import read_structure
from exporter.tasks.registry import Task

TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_EXAMPLE_BATCH = 2
_EXAMPLE_LENGTH = 16
# Learned position tables, by the names that the model families give them.
_POSITION_TABLES = ("position_embeddings", "embed_positions", "position_embedding", "wpe")


def open_folder(source: Source, task: Task, *, max_batch: int, max_length: int | None, attends: bool) -> Original:
    """Load a folder's model for a task.

    The returned module is the `transformers` model itself (so that exporters recognise it), of a subclass whose
    ``forward`` takes exactly the signature's inputs and returns a flat ``dict``. It stays right under ``copy.deepcopy``
    and ``.to(dtype)``.

    Raises:
        RequestError: The model cannot be loaded, weights of its head are missing, or `max_length` is beyond its limit.
    """
    model = load_model(source, task)
    head = load_sentence_head(source) if task.name == "feature-extraction" else None
    image = model.main_input_name == "pixel_values"
    if image:
        specs, axes, contract, example = _image_inputs(source, model, max_batch)
    else:
        specs, axes, contract, example = _text_inputs(source, model, max_batch, max_length, attends)
    names = tuple(spec.name for spec in specs)
    flatten_forward(model, names, task.outputs, head)
    signature = signature_of(lambda inputs: model(**inputs), specs, axes, example)
    limit = None if image else signature.axis("sequence").max
    return Original(
        source=source,
        task=replace(task, modality="image", roles=("image",)) if image else task,
        module=model,
        signature=signature,
        contract=contract,
        example=example,
        modality="image" if image else "text",
        encoder_folder=source.path,
        max_length=limit,
    )


_MASKED = "It was saved with pruning masks: call torch.nn.utils.prune.remove for each pruned weight, and save it again"


def _vocabulary(model: Any) -> int:
    """How many token ids there are."""
    size = getattr(input_embedding(model), "num_embeddings", None) or getattr(model.config, "vocab_size", None)
    if isinstance(size, int) and size > 0:
        return size
    raise RequestError(
        "the size of the vocabulary is not known",
        type(model).__name__,
        "Have the class define get_input_embeddings, or its configuration vocab_size",
    )


def load_model(source: Source, task: Task) -> Any:
    """The `transformers` model in FP32 and evaluation mode, every weight of it from the folder.

    Raises:
        RequestError: It cannot be loaded, or weights that the task needs are not in the folder.
    """
    import transformers

    auto = getattr(transformers, str(task.auto_class))
    options: dict[str, Any] = {
        "dtype": torch.float32,
        "trust_remote_code": source.trust_remote_code,
        "use_safetensors": not source.pickled,
        "local_files_only": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # they are reported, and refused below with their names
    }
    with quiet_transformers():
        try:
            # The pooler's output is not asked for, its weights are often missing.
            without = (
                {"add_pooling_layer": False}
                if task.name == "feature-extraction" and _has_optional_pooler(source)
                else {}
            )
            if source.path is not None and (structure := read_structure(source.path)) is not None:
                return _load_structured(source, auto, structure, without)
            model, info = auto.from_pretrained(source.path, **options, **without)
        except RequestError:
            raise
        except Exception as error:  # configuration and modelling code raise anything on bad input
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise RequestError(
                f"the model cannot be loaded for {task.name}",
                f"{type(error).__name__}: {lines[0][:300] if lines else '(no message)'}",
                f"Look at config.json and the weights in {source.path}",
            ) from error
    missing = sorted(info["missing_keys"])
    mismatched = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get("mismatched_keys", ()))
    masked = any(str(name).endswith("_mask") for name in info.get("unexpected_keys", ()))
    if missing or mismatched:
        names = [*missing, *mismatched]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise RequestError(
            f"the folder has no fitting weights for parts that {task.name} needs: they would be random",
            ", ".join(names[:5]) + more,
            "Choose the task that the model was trained for" if not masked else _MASKED,
        )
    return model.eval().requires_grad_(False)


def _load_structured(source: Source, auto: Any, structure: dict[str, Any], options: dict[str, Any]) -> Any:
    """A model that Planish changed inside: made from its configuration, resized, filled."""
    from transformers import AutoConfig

    path = source.path
    if path is None:
        raise RequestError("the source is no folder", source.spec)
    config = AutoConfig.from_pretrained(path, trust_remote_code=source.trust_remote_code, local_files_only=True)
    model = auto.from_config(config, trust_remote_code=source.trust_remote_code, dtype=torch.float32, **options)
    apply_structure(model, structure)
    own = model.state_dict()
    state = {name: tensor.float() for name, tensor in read_state(path, _own_weights(source)).items()}
    prefix = f"{model.base_model_prefix}."
    if not any(name.startswith(prefix) for name in own) and any(name.startswith(prefix) for name in state):
        # A bare encoder out of a model with a head.
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        state = {name: tensor for name, tensor in state.items() if name in own}
    load_state(model, state, path)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def _own_weights(source: Source) -> list[str]:
    """The weight files of the encoder, without those of the modules behind it."""
    return [name for name in source.weights if "/" not in name]


def flatten_forward(model: Any, inputs: tuple[str, ...], outputs: tuple[str, ...], head: SentenceHead | None) -> None:
    """Make the model's ``forward`` take exactly `inputs` and return those of `outputs` that it has, as a `dict`."""
    base = type(model)
    if head is not None:
        model.sentence_head = head.eval().requires_grad_(False)

    def forward(self: Any, **given: Any) -> dict[str, Any]:
        found = base.forward(self, **given, return_dict=True)
        if head is not None:
            found["sentence_embedding"] = self.sentence_head(found["last_hidden_state"], given["attention_mask"])
        return {name: found[name] for name in outputs if found.get(name) is not None}

    sign_forward(model, forward, inputs)


def position_limit(model: Any) -> int | None:
    """The longest sequence that the model has positions for, or ``None`` where its positions are relative only.

    A position table with a padding index (RoBERTa, MPNet) counts positions from behind that index, and one with an
    offset (OPT, BART) from there.
    """
    limits = []
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in _POSITION_TABLES and isinstance(module, torch.nn.Embedding):
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - int(getattr(module, "offset", offset)))
    declared = getattr(model.config, "max_position_embeddings", None)
    if limits and isinstance(declared, int) and declared > 0:
        limits.append(declared)
    if not limits:
        values = [getattr(model.config, key, None) for key in POSITION_KEYS]
        limits = [value for value in values if isinstance(value, int) and value > 0]
    return min(limits) if limits else None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep the library's progress bars and warnings off the screen; what matters is checked and raised."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _has_optional_pooler(source: Source) -> bool:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(source.path, trust_remote_code=source.trust_remote_code, local_files_only=True)
    mapping = AutoModel._model_mapping
    if type(config) not in mapping:
        return False
    return "add_pooling_layer" in inspect.signature(mapping[type(config)].__init__).parameters


def _text_inputs(
    source: Source, model: Any, max_batch: int, max_length: int | None, attends: bool
) -> tuple[tuple[TensorSpec, ...], tuple[Axis, ...], InputContract, dict[str, Any]]:
    tokenizer = source.json("tokenizer_config.json") or {}
    accepted = inspect.signature(type(model).forward).parameters
    types = int(getattr(model.config, "type_vocab_size", 0) or 0)
    gives = tokenizer.get("model_input_names")
    # With one token type only, its ids are all zero and the model adds them itself.
    with_types = types > 1 and (gives is None or "token_type_ids" in gives)
    names = [n for n in TEXT_INPUTS if n in accepted and (n != "token_type_ids" or with_types)]
    vocabulary = _vocabulary(model)
    ranges = {"input_ids": (0, vocabulary - 1), "attention_mask": (0, 1), "token_type_ids": (0, types - 1)}

    limit = _length_limit(model, tokenizer, source, max_length)
    axes = (Axis("batch", 1, max_batch), Axis("sequence", 1, limit))
    specs = tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in names)
    contract = InputContract(
        attends=attends and "attention_mask" in names,
        mask="attention_mask" if "attention_mask" in names else None,
        id_ranges={name: ranges[name] for name in names},
    )
    return specs, axes, contract, _example_texts(names, vocabulary, model.config, min(max_batch, _EXAMPLE_BATCH), limit)


def _length_limit(model: Any, tokenizer: dict[str, Any], source: Source, wanted: int | None) -> int:
    declared = tokenizer.get("model_max_length")
    limits = [position_limit(model), int(declared) if isinstance(declared, int | float) else None]
    known = [value for value in limits if value is not None and 0 < value < NO_LIMIT]
    limit = min(known) if known else None
    if wanted is None:
        return limit or DEFAULT_MAX_LENGTH
    if limit is not None and wanted > limit:
        raise RequestError(
            "max_length is beyond what the source can take", wanted, f"{source.spec} takes {limit} tokens at most"
        )
    return wanted


def _example_texts(names: list[str], vocabulary: int, config: Any, batch: int, limit: int) -> dict[str, Any]:
    """Random tokens, the last row shorter than the others, padded on the right."""
    length = min(_EXAMPLE_LENGTH, limit)
    generator = torch.Generator().manual_seed(0)
    pad = getattr(config, "pad_token_id", None)
    pad = pad if isinstance(pad, int) and 0 <= pad < vocabulary else 0
    ids = torch.randint(0, vocabulary, (batch, length), generator=generator)
    ids[ids == pad] = (pad + 1) % vocabulary
    mask = torch.ones(batch, length, dtype=torch.int64)
    if batch > 1 and length > 3:
        mask[-1, -3:] = 0
    ids[mask == 0] = pad
    made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return {name: made[name] for name in names}


def _image_inputs(
    source: Source, model: Any, max_batch: int
) -> tuple[tuple[TensorSpec, ...], tuple[Axis, ...], InputContract, dict[str, Any]]:
    from exporter.preprocess import ImageSettings

    preprocessor = source.json("preprocessor_config.json")
    size: tuple[int, int] | None = None
    if preprocessor is not None:
        size = ImageSettings.from_config(preprocessor).output_size
    declared = getattr(model.config, "image_size", None)
    if size is None and declared is not None:
        size = (int(declared), int(declared)) if isinstance(declared, int) else (int(declared[0]), int(declared[1]))
    if size is None:
        raise RequestError(
            "the image size is not known", source.spec, "Add preprocessor_config.json with the size of the images"
        )
    channels = int(getattr(model.config, "num_channels", 3))
    batch = min(max_batch, _EXAMPLE_BATCH)
    pixels = torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0))
    spec = TensorSpec("pixel_values", "float32", ("batch", channels, *size))
    return (spec,), (Axis("batch", 1, max_batch),), InputContract(), {"pixel_values": pixels}
