"""Data for runs whose user gives none: sentences, questions, pictures and tensors, all made for Planish."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib import resources

import numpy as np

from calibration.datasets import Dataset, make_dataset
from calibration.roles import Row
from exporter.artifact import InputContract, Signature
from exporter.errors import RequestError


def default_sentences() -> Dataset:
    """English sentences of 2 to about 100 words, unlabelled; role ``text``."""
    return make_dataset("built-in sentences", ("text",), lambda: ({"text": line} for line in _sentences()), False)


def default_tokens() -> Dataset:
    """The built-in sentences, split at spaces and unlabelled; role ``tokens``."""
    return make_dataset(
        "built-in sentences", ("tokens",), lambda: ({"tokens": line.split()} for line in _sentences()), False
    )


def default_questions() -> Dataset:
    """Questions on short paragraphs with their answers; roles ``question``, ``context``, ``answers``, ``id``."""

    def rows() -> Iterator[Row]:
        for number, line in enumerate(_read("questions.jsonl").strip("\n").split("\n")):
            entry = json.loads(line)
            for position, (question, answer) in enumerate(entry["questions"]):
                yield {
                    "question": question,
                    "context": entry["context"],
                    "answers": [answer],
                    "id": f"{number}-{position}",
                }

    return make_dataset("built-in questions", ("question", "context", "answers", "id"), rows, True)


def default_images(count: int = 64, size: int = 256, seed: int = 0) -> Dataset:
    """Generated pictures, unlabelled; role ``image``: uint8 arrays of shape (`size`, `size`, 3).

    Each is a smooth gradient, noise whose amplitude falls as 1/f (the spectrum of natural images: D. J. Field,
    "Relations between the statistics of natural images and the response properties of cortical cells", 1987), and a few
    discs and rectangles, mixed at random, so that a vision model sees smooth areas, textures and edges.
    """

    def rows() -> Iterator[Row]:
        for number in range(count):
            yield {"image": _picture(np.random.default_rng([seed, number]), size)}

    return make_dataset("generated pictures", ("image",), rows, False)


def generated_tensors(
    signature: Signature, contract: InputContract, count: int = 64, length: int = 32, seed: int = 0
) -> Dataset:
    """Random rows for any model, roles by input name: each row a batch of one.

    Floating inputs are standard normal, integers even over the contract's range (0 to 1 where it gives none), the
    mask all ones; dynamic axes other than ``batch`` get a length up to `length` of their own in every row.
    """

    def rows() -> Iterator[Row]:
        for number in range(count):
            rng = np.random.default_rng([seed, number])
            lengths = {a.name: int(rng.integers(a.min, max(a.min, min(a.max, length)) + 1)) for a in signature.axes}
            lengths["batch"] = 1
            row: Row = {}
            for spec in signature.inputs:
                shape = tuple(lengths[dim] if isinstance(dim, str) else dim for dim in spec.shape)
                dtype = np.dtype(spec.dtype)
                if spec.name == contract.mask:
                    row[spec.name] = np.ones(shape, dtype)
                elif dtype.kind == "f":
                    row[spec.name] = rng.standard_normal(shape).astype(dtype)
                else:
                    low, high = contract.id_ranges.get(spec.name, (0, 1))
                    row[spec.name] = rng.integers(low, high, shape, endpoint=True).astype(dtype)
            yield row

    return make_dataset("generated tensors", tuple(spec.name for spec in signature.inputs), rows, False)


_DEFAULTS: dict[str, Callable[[], Dataset]] = {
    "feature-extraction": default_sentences,
    "text-classification": default_sentences,
    "token-classification": default_tokens,
    "question-answering": default_questions,
    "fill-mask": default_sentences,
    "image-classification": default_images,
}


def default_dataset(
    task: str, signature: Signature | None = None, contract: InputContract | None = None, *, seed: int = 0
) -> Dataset:
    """What a run uses when its user gives no data.

    Raises:
        RequestError: The task has no data of its own, and there is no `signature` to generate tensors from.
    """
    if task in _DEFAULTS:
        return _DEFAULTS[task]()
    if signature is None:
        raise RequestError("this task has no built-in data", task, "Give data (for tensors, a .npz file)")
    return generated_tensors(signature, contract or InputContract(), seed=seed)


def _read(name: str) -> str:
    return resources.files("calibration").joinpath("data", name).read_text(encoding="utf-8")


def _sentences() -> list[str]:
    return [line for line in _read("sentences.txt").split("\n") if line]


def _picture(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = np.meshgrid(np.linspace(0, 1, size), np.linspace(0, 1, size), indexing="ij")
    angle = rng.uniform(0, 2 * np.pi, 3)
    gradient = x[..., None] * np.cos(angle) + y[..., None] * np.sin(angle)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :])
    frequency[0, 0] = np.inf  # no constant part
    white = np.fft.rfft2(rng.standard_normal((size, size, 3)), axes=(0, 1))
    texture = np.fft.irfft2(white / frequency[..., None], s=(size, size), axes=(0, 1))
    picture = rng.uniform(0.2, 1) * gradient + rng.uniform(0.1, 0.6) * texture / texture.std()
    for _ in range(int(rng.integers(1, 6))):
        centre_y, centre_x, extent = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.05, 0.3)
        if rng.random() < 0.5:
            inside = np.hypot(x - centre_x, y - centre_y) < extent
        else:
            inside = np.maximum(abs(x - centre_x), abs(y - centre_y) * rng.uniform(0.5, 2)) < extent
        picture[inside] = rng.uniform(picture.min(), picture.max(), 3)
    low, high = picture.min(), picture.max()
    return np.round((picture - low) / (high - low) * 255).astype(np.uint8)
