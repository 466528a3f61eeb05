"""`load`: a bundle as a model that takes texts, images or arrays."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from calibration.roles import Row
from exporter.errors import RequestError
from exporter.preprocess import load_encoder, read_labels
from exporter.tasks import get_task
from pipelines.bundle import Bundle, read_bundle
from pipelines.integrity import changed_files, refuse
from pipelines.postprocess import Form, Reader, form_of, problem_type
from pipelines.recipe import usable_cores
from pipelines.routing import FallbackWarning, Router
from pipelines.trust import trusted
from pipelines.verification.encode import EncodedBatch

__all__ = ["FallbackWarning", "Model", "load"]

Array = np.ndarray
_READ = (".json", ".txt", ".model", ".jinja")
"""Endings of configuration and tokenizer files."""


class Model:
    """A bundle that runs: call it with what its task takes.

    Each batch goes to the variant that was selected for the nearest operating point. Variants are opened when first
    needed, once. Where one cannot be opened here another one that passed takes its place: one `FallbackWarning` says
    why, and `notes` keeps it. Safe to call from several threads; a context manager.

    What a call gives, by task (for a single text or image the lone answer, for a list a list):

    - feature-extraction: float32 array (n, dim); the model's sentence embedding, or else the mean over its tokens;
    - text-classification, image-classification: ``{"label", "score"}``, with `top_k` a list of them;
    - token-classification: a list of ``{"word", "start", "end", "label", "score"}``;
    - question-answering: ``{"answer", "start", "end", "score"}``;
    - fill-mask: a list of ``{"token", "token_id", "score"}``, for a text with several masks a list of such lists;
    - custom: arrays by output name.

    >>> with load(bundle) as model:  # a bundle for feature-extraction
    ...     vectors = model(["The river is long.", "What a film!"])
    >>> vectors.dtype, len(vectors)
    (dtype('float32'), 2)
    """

    def __init__(self, bundle: Bundle, router: Router) -> None:
        self.bundle = bundle
        self.task = get_task(bundle.manifest.task)
        self._router = router
        # A tokenizer is changed by every call (its truncation), so that only one may use it at a time.
        self._encoding: AbstractContextManager[Any] = (
            threading.Lock() if self.task.modality == "text" else nullcontext()
        )

    def __repr__(self) -> str:
        opened = ", ".join(self.opened) or "nothing opened yet"
        return f"<Model {self.bundle.path} for {self.task.name}: {opened}>"

    @property
    def notes(self) -> list[str]:
        """What fell back to what, and why."""
        return list(self._router.notes)

    @property
    def opened(self) -> tuple[str, ...]:
        """Ids of the variants that are open."""
        return tuple(self._router.sessions)

    def selected_for(self, batch: int, length: int | None = None) -> str:
        """Id of the variant selected for inputs of so many rows and tokens (whether or not it can be opened here)."""
        return self._router.selected_for(batch, length)

    def __call__(
        self,
        inputs: Any = None,
        *,
        pairs: Any = None,
        question: Any = None,
        context: Any = None,
        top_k: int | None = None,
        batch_size: int = 32,
    ) -> Any:
        """Answers for inputs.

        Args:
            inputs: A text or a list of texts; for question-answering a list of (question, context); for
                image-classification images (paths, PIL images, uint8 arrays (height, width, 3)); for every task a dict
                of arrays by input name, which is `run`. Texts beyond the model's limit are cut.
            pairs: For text-classification: the second text of each input.
            question: For question-answering: a question or several, with as many `context`.
            context: The texts that hold the answers.
            top_k: For classification and fill-mask: how many answers per input, best first.
            batch_size: Inputs that are run together; they are sorted by length first.

        Raises:
            RequestError: Inputs that the task does not take, or the bundle has no tokenizer.
            EnvironmentLackError: No variant can be opened here.
        """
        given = {"pairs": pairs, "question": question, "context": context, "top_k": top_k}
        given = {name: value for name, value in given.items() if value is not None}
        if isinstance(inputs, Mapping):
            self._refuse_unknown(given, ())
            return self.run(inputs)
        form = form_of(self.task.name)
        self._refuse_unknown(given, form.accepts)
        for name, value in (("batch_size", batch_size), ("top_k", top_k)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise RequestError(f"{name} must be a whole number of at least 1", repr(value))
        rows, lone = form.rows(inputs, **{name: value for name, value in given.items() if name != "top_k"})
        answers = self._answers(form, rows, batch_size, top_k)
        if lone:
            return answers[0]
        return self._stacked(answers) if self.task.name == "feature-extraction" else answers

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """Arrays in, arrays out, by name, in one batch; for every task.

        Raises:
            RequestError: Names, dtypes, shapes or values that the model does not take.
            EnvironmentLackError: No variant can be opened here.
        """
        return self._router.run(inputs)

    def close(self) -> None:
        """Free what the open variants hold; the model cannot be called any more."""
        self._router.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @cached_property
    def _encoder(self) -> Any:
        encoder = load_encoder(self.bundle.path, self.task, self.bundle.signature)
        if encoder is None:
            names = ", ".join(spec.name for spec in self.bundle.signature.inputs)
            raise RequestError("this model takes arrays", names, "Give a dict from input name to array")
        return encoder

    @cached_property
    def _reader(self) -> Reader:
        problem = problem_type(self.bundle.path)
        return Reader(self._encoder, read_labels(self.bundle.path), problem)

    def _refuse_unknown(self, given: Mapping[str, Any], accepted: tuple[str, ...]) -> None:
        if unknown := [name for name in given if name not in accepted]:
            takes = f"It takes inputs{', and ' + ', '.join(accepted) if accepted else ' alone'}"
            raise RequestError(f"{self.task.name} has no argument {unknown[0]!r} for these inputs", None, takes)

    def _answers(self, form: Form, rows: list[Row], batch_size: int, top_k: int | None) -> list[Any]:
        if not rows:
            return []
        with self._encoding:
            read = self._reader
        reader = Reader(read.encoder, read.labels, read.problem, top_k)
        answers: list[Any] = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: _size(rows[i]), reverse=True)
        step = self._rows_at_once(batch_size)
        for begin in range(0, len(order), step):
            places = order[begin : begin + step]
            with self._encoding:
                batch = self._encode(form, [rows[i] for i in places])
            outputs = self._run_rows(batch.inputs, len(places))
            with self._encoding:
                found = form.answer(reader, batch, outputs)
            for i, answer in zip(places, found, strict=True):
                answers[i] = answer
        return answers

    def _encode(self, form: Form, rows: list[Row]) -> EncodedBatch:
        if self.task.modality != "text":
            return form.encode(self._encoder, rows, None)
        shortest, longest = self._bounds(1)
        batch = form.encode(self._encoder, rows, longest if shortest == longest else None)
        if batch.inputs["input_ids"].shape[1] < shortest:
            batch = form.encode(self._encoder, rows, shortest)
        return batch

    def _run_rows(self, inputs: dict[str, Array], count: int) -> dict[str, Array]:
        """Run encoded rows as the graph takes them: its dtypes, and no fewer rows than it accepts."""
        dtypes = {spec.name: spec.dtype for spec in self.bundle.signature.inputs}
        ready = {name: array.astype(dtypes.get(name, array.dtype), copy=False) for name, array in inputs.items()}
        low, _ = self._bounds(0)
        if count >= low:
            return self._router.run(ready)
        repeat = np.minimum(np.arange(low), count - 1)  # the last row again, until there are enough
        outputs = self._router.run({name: array[repeat] for name, array in ready.items()})
        return {name: value[:count] for name, value in outputs.items()}

    def _rows_at_once(self, batch_size: int) -> int:
        if self.task.modality == "image" and self._encoder.settings.output_size is None:
            return 1  # images of their own sizes cannot share a batch
        return max(min(batch_size, self._bounds(0)[1]), 1)

    def _bounds(self, dimension: int) -> tuple[int, int]:
        """The smallest and largest size that a dimension of the model's first input accepts."""
        signature = self.bundle.signature
        size = signature.inputs[0].shape[dimension]
        if isinstance(size, int):
            return size, size
        axis = signature.axis(size)
        return axis.min, axis.max

    def _stacked(self, vectors: list[Array]) -> Array:
        if vectors:
            return np.stack(vectors)
        outputs = {spec.name: spec for spec in self.bundle.signature.outputs}
        spec = outputs.get("sentence_embedding", self.bundle.signature.outputs[0])
        width = spec.shape[-1]
        return np.zeros((0, width if isinstance(width, int) else 0), np.float32)


def _size(row: Row) -> int:
    return sum(len(value) for value in row.values() if isinstance(value, str))


def load(
    bundle: Path | str | Bundle,
    *,
    threads: int | None = None,
    trust: bool = False,
    variant: str | None = None,
    trusted_digests: frozenset[str] | None = None,
    check: bool = True,
) -> Model:
    """Open a bundle for use. Nothing of PyTorch is imported unless the variant that runs is PyTorch's.

    Args:
        bundle: Its folder, or the bundle.
        threads: Compute threads of a runtime; default: the cores that this process may use.
        trust: Open this bundle's engines (native code) wherever they were built: for bundles whose origin you know.
        variant: Use this variant, whatever was selected; nothing takes its place.
        trusted_digests: SHA-256 digests of the engines that may be opened; default: those that this user built here.
        check: Read what is used of the bundle only where it is as the manifest says: its configuration and tokenizer
            now, a variant's files before they are opened (about a second for each GB). `verify` checks everything.

    Raises:
        RequestError: No bundle, no variant of that name, none that passed, or its configuration was changed.
    """
    if not isinstance(bundle, Bundle):
        bundle = read_bundle(Path(bundle))
    if check:
        _refuse_changed(bundle)
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise RequestError("threads must be a whole number of at least 1", repr(threads))
    digests = trusted() if trusted_digests is None else frozenset(trusted_digests)
    if trust:
        digests |= _engines(bundle)
    router = Router(bundle, threads=threads or usable_cores(), trusted_digests=digests, pinned=variant, check=check)
    return Model(bundle, router)


def _refuse_changed(bundle: Bundle) -> None:
    """Refuse a bundle whose configuration or tokenizer is not what was released: it would answer something else."""
    apart = ("evidence/", "onnx/", "variants/", "report.json")
    names = [name for name in bundle.manifest.files if name.endswith(_READ) and not name.startswith(apart)]
    refuse([d for d in changed_files(bundle.path, names, bundle.manifest.files) if d.kind != "missing"])


def _engines(bundle: Bundle) -> frozenset[str]:
    """The digests that the manifest gives for the files of its engines."""
    from exporter.targets import targets

    known = targets()
    names = [
        name
        for entry in bundle.manifest.variants
        if entry.target in known and not known[entry.target].portable
        for name in entry.files
    ]
    return frozenset(bundle.manifest.files[name].sha256 for name in names if name in bundle.manifest.files)
