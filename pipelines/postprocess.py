"""What a served model takes and gives, by task: from a caller's texts and images to rows, from outputs to answers.

How outputs are read is what verification measured (`pipelines.verification.predict`); here answers get their names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibration.roles import Row
from exporter.errors import InternalError, RequestError
from pipelines.verification.encode import EncodedBatch
from pipelines.verification.predict import predict

Array = np.ndarray
_TOP_TOKENS = 5


@dataclass(frozen=True)
class Reader:
    """What answers are read with.

    Attributes:
        encoder: The bundle's encoder.
        labels: Class names by index.
        problem: The configuration's ``problem_type``; empty where it names none.
        top_k: How many answers per input were asked for; `None`: as many as is usual for the task.
    """

    encoder: Any
    labels: Mapping[int, str]
    problem: str = ""
    top_k: int | None = None

    def label(self, index: int) -> str:
        return self.labels.get(index, f"LABEL_{index}")


@dataclass(frozen=True)
class Form:
    """How a task is served.

    Attributes:
        rows: The caller's inputs as rows by role, and whether it was a single one.
        encode: Encoder, rows and the length to pad to (`None`: the longest) to model inputs.
        answer: One answer per row of a batch.
        accepts: The keyword arguments that the task knows, beside inputs.
    """

    rows: Callable[..., tuple[list[Row], bool]]
    encode: Callable[[Any, list[Row], int | None], EncodedBatch]
    answer: Callable[[Reader, EncodedBatch, Mapping[str, Array]], list[Any]]
    accepts: tuple[str, ...] = ()


def form_of(task: str) -> Form:
    """How a task is served.

    Raises:
        RequestError: It takes arrays only.
    """
    if task not in _FORMS:
        raise RequestError(
            "a model of this task takes arrays, not texts or images", task, "Give a dict from input name to array"
        )
    return _FORMS[task]


def problem_type(folder: Path) -> str:
    """The ``problem_type`` of a folder's ``config.json``; empty where there is none.

    Raises:
        RequestError: The file is not JSON.
    """
    path = folder / "config.json"
    if not path.is_file():
        return ""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(f"config.json is not valid JSON ({error})", path, "Copy or make the bundle again") from error
    return str(config.get("problem_type") or "") if isinstance(config, dict) else ""


# From a caller's inputs to rows --------------------------------------------------------------------------------------


def texts_of(value: Any, name: str = "inputs") -> tuple[list[str], bool]:
    """A text or several as a list, and whether it was a single one.

    Raises:
        RequestError: Something in it is no string; says which.
    """
    if isinstance(value, str):
        return [value], True
    if value is None or not hasattr(value, "__iter__") or isinstance(value, bytes | Mapping):
        raise RequestError(f"{name} must be a text or a list of texts", repr(value)[:60])
    texts = list(value)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise RequestError(f"{name}[{index}] is no text", repr(text)[:60], "Give strings")
    return texts, False


def _text_rows(inputs: Any, *, pairs: Any = None) -> tuple[list[Row], bool]:
    texts, lone = texts_of(inputs)
    if pairs is None:
        return [{"text": text} for text in texts], lone
    seconds, _ = texts_of(pairs, "pairs")
    _same_number(texts, seconds, "pairs")
    return [{"text": first, "text_pair": second} for first, second in zip(texts, seconds, strict=True)], lone


def _question_rows(inputs: Any = None, *, question: Any = None, context: Any = None) -> tuple[list[Row], bool]:
    if inputs is None:
        questions, lone = texts_of(question, "question")
        contexts, _ = texts_of(context, "context")
        _same_number(questions, contexts, "contexts")
        return [{"question": q, "context": c} for q, c in zip(questions, contexts, strict=True)], lone
    if question is not None or context is not None:
        raise RequestError("questions were given twice", None, "Give pairs, or question= and context=")
    if isinstance(inputs, str | bytes) or not hasattr(inputs, "__iter__"):
        raise RequestError("inputs must be a list of (question, context)", repr(inputs)[:60])
    rows = []
    for index, pair in enumerate(inputs):
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RequestError(f"inputs[{index}] is no pair of question and context", repr(pair)[:60])
        rows.append({"question": pair[0], "context": pair[1]})
    return rows, False


def _image_rows(inputs: Any) -> tuple[list[Row], bool]:
    lone = isinstance(inputs, str | Path) or hasattr(inputs, "convert") or getattr(inputs, "ndim", 0) == 3
    if not lone and not hasattr(inputs, "__iter__"):
        raise RequestError("inputs must be an image or a list of images", repr(inputs)[:60])
    images = [inputs] if lone else list(inputs)
    for index, image in enumerate(images):
        if not isinstance(image, str | Path | np.ndarray) and not hasattr(image, "convert"):
            raise RequestError(
                f"inputs[{index}] is no image", repr(image)[:60], "Give a path, a PIL image or a uint8 array"
            )
    return [{"image": image} for image in images], lone


def _same_number(first: Sequence[str], second: Sequence[str], name: str) -> None:
    if len(first) != len(second):
        raise RequestError(f"there must be as many {name} as inputs", f"{len(first)} and {len(second)}")


# From rows to model inputs -------------------------------------------------------------------------------------------


def _encode_texts(encoder: Any, rows: list[Row], pad_to: int | None) -> EncodedBatch:
    pairs = [row["text_pair"] for row in rows] if "text_pair" in rows[0] else None
    return _encoded(encoder.encode_with_offsets([row["text"] for row in rows], pairs, pad_to=pad_to), rows)


def _encode_questions(encoder: Any, rows: list[Row], pad_to: int | None) -> EncodedBatch:
    questions, contexts = [row["question"] for row in rows], [row["context"] for row in rows]
    return _encoded(encoder.encode_with_offsets(questions, contexts, pad_to=pad_to), rows)


def _encode_masked(encoder: Any, rows: list[Row], pad_to: int | None) -> EncodedBatch:
    if encoder.mask_id is None:
        raise RequestError("the tokenizer has no mask token", None, "fill-mask needs one in tokenizer_config.json")
    return _encode_texts(encoder, rows, pad_to)


def _encode_images(encoder: Any, rows: list[Row], pad_to: int | None) -> EncodedBatch:
    return EncodedBatch(list(range(len(rows))), encoder.encode([row["image"] for row in rows]), rows)


def _encoded(encoded: Any, rows: list[Row]) -> EncodedBatch:
    return EncodedBatch(
        list(range(len(rows))), encoded.inputs, rows, encoded.offsets, encoded.sequence_ids, encoded.word_ids
    )


# From outputs to answers ---------------------------------------------------------------------------------------------


def _embeddings(reader: Reader, batch: EncodedBatch, outputs: Mapping[str, Array]) -> list[Any]:
    return [vector.astype(np.float32) for vector in predict("feature-extraction", batch, outputs)]


def softmax(logits: Array) -> Array:
    """Softmax over the last axis, float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def class_scores(logits: Array, problem: str) -> Array:
    """Scores of classes, float64: independent ones for several labels or a lone logit, raw ones for a regression."""
    if problem == "regression":
        return logits.astype(np.float64)
    if problem == "multi_label_classification" or logits.shape[-1] == 1:
        return np.asarray(np.exp(-np.logaddexp(0.0, -logits.astype(np.float64))))
    return softmax(logits)


def _classes(reader: Reader, batch: EncodedBatch, outputs: Mapping[str, Array]) -> list[Any]:
    """The likeliest class; with `top_k` a list of so many."""
    found = []
    for scores in class_scores(outputs["logits"], reader.problem):
        best = np.argsort(-scores, kind="stable")[: reader.top_k or 1]
        named = [{"label": reader.label(int(i)), "score": float(scores[i])} for i in best]
        found.append(named[0] if reader.top_k is None else named)
    return found


def _known(array: Array | None) -> Array:
    if array is None:
        raise InternalError("a batch was encoded without the way back to its texts")
    return array


def _tags(reader: Reader, batch: EncodedBatch, outputs: Mapping[str, Array]) -> list[Any]:
    """The words of a text, each with the class of its first token; words beyond the model's limit are left out."""
    offsets, word_ids = _known(batch.offsets), _known(batch.word_ids)
    prefix = len(reader.encoder.prefix)
    found = []
    for i, row in enumerate(batch.rows):
        words: dict[int, list[int]] = {}
        for position in np.flatnonzero(word_ids[i] >= 0):
            words.setdefault(int(word_ids[i, position]), []).append(int(position))
        tagged = []
        for places in words.values():
            start = max(int(offsets[i, places, 0].min()) - prefix, 0)
            end = int(offsets[i, places, 1].max()) - prefix
            word = row["text"][start : max(end, 0)]
            start += len(word) - len(word.lstrip())  # some tokenizers count the space before a word as part of it
            if not word.strip():
                continue
            scores = softmax(outputs["logits"][i, places[0]])
            best = int(scores.argmax())
            tagged.append(
                {
                    "word": word.strip(),
                    "start": start,
                    "end": start + len(word.strip()),
                    "label": reader.label(best),
                    "score": float(scores[best]),
                }
            )
        found.append(tagged)
    return found


def _answers(reader: Reader, batch: EncodedBatch, outputs: Mapping[str, Array]) -> list[Any]:
    """The likeliest span of each context; its score is the probability of its start times that of its end."""
    offsets, sequence_ids = _known(batch.offsets), _known(batch.sequence_ids)
    found = []
    for i, span in enumerate(predict("question-answering", batch, outputs)):
        places = np.flatnonzero(sequence_ids[i] == 1)
        score = 0.0
        if places.size:
            begins = softmax(outputs["start_logits"][i, places])[offsets[i, places, 0] == span.start]
            ends = softmax(outputs["end_logits"][i, places])[offsets[i, places, 1] == span.end]
            score = float(begins.max() * ends.max())
        found.append({"answer": span.text, "start": span.start, "end": span.end, "score": score})
    return found


def _fillings(reader: Reader, batch: EncodedBatch, outputs: Mapping[str, Array]) -> list[Any]:
    """The likeliest tokens for the mask; for a text with several masks a list per mask."""
    encoder = reader.encoder
    found = []
    for i, row in enumerate(batch.rows):
        masks = np.flatnonzero(batch.inputs["input_ids"][i] == encoder.mask_id)
        if not masks.size:
            raise RequestError(
                "a text has no mask, or has it beyond the model's limit",
                repr(row["text"])[:60],
                f"Write {encoder.mask_token} where a token is to be found",
            )
        filled = [_best_tokens(encoder.tokenizer, outputs["logits"][i, place], reader.top_k) for place in masks]
        found.append(filled[0] if len(filled) == 1 else filled)
    return found


def _best_tokens(tokenizer: Any, logits: Array, top_k: int | None) -> list[dict[str, Any]]:
    scores = softmax(logits)
    # Embedding tables are often longer than the vocabulary: ids beyond it mean nothing.
    known = (int(i) for i in np.argsort(-scores, kind="stable") if tokenizer.id_to_token(int(i)) is not None)
    best = [index for index, _ in zip(known, range(top_k or _TOP_TOKENS), strict=False)]
    return [
        {"token": tokenizer.decode([i], skip_special_tokens=False).strip(), "token_id": i, "score": float(scores[i])}
        for i in best
    ]


_FORMS: dict[str, Form] = {
    "feature-extraction": Form(_text_rows, _encode_texts, _embeddings),
    "text-classification": Form(_text_rows, _encode_texts, _classes, ("pairs", "top_k")),
    "token-classification": Form(_text_rows, _encode_texts, _tags),
    "question-answering": Form(_question_rows, _encode_questions, _answers, ("question", "context")),
    "fill-mask": Form(_text_rows, _encode_masked, _fillings, ("top_k",)),
    "image-classification": Form(_image_rows, _encode_images, _classes, ("top_k",)),
}
