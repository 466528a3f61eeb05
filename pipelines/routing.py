"""Which variant of a bundle runs a batch, and what takes its place where it cannot be opened."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.artifact import Signature
from exporter.errors import EnvironmentLackError, PlanishError, RequestError
from pipelines.baselines import PORTABLE
from pipelines.integrity import changed_files, refuse
from pipelines.recipe_sections import parse_point

if TYPE_CHECKING:
    from exporter.targets.base import Session
    from pipelines.bundle import Bundle
    from pipelines.manifest import VariantEntry

Array = np.ndarray
# What opening raises beside Planish's own errors: a runtime that does not import, a damaged file beside an engine.
_OPENING_ERRORS = (PlanishError, ImportError, OSError, RuntimeError, ValueError, LookupError)


class FallbackWarning(UserWarning):
    """A variant could not be opened here, and another one took its place."""


def nearest_point(points: Iterable[str], batch: int, length: int | None) -> str | None:
    """The operating point that lies nearest, by the logarithms of batch and length; the first of equals.

    >>> nearest_point(["1x16", "1x128", "8x128"], batch=5, length=90)
    '8x128'
    """

    def distance(point: tuple[int, int | None]) -> float:
        along = math.log(max(batch, 1) / point[0])
        across = 0.0 if length is None or point[1] is None else math.log(max(length, 1) / point[1])
        return math.hypot(along, across)

    return min(points, key=lambda name: distance(parse_point(name)), default=None)


def batch_and_length(inputs: Mapping[str, Array], signature: Signature) -> tuple[int, int | None]:
    """How many rows inputs have and how long they are; (1, `None`) where no axis says so."""
    sizes: dict[str, int] = {}
    for spec in signature.inputs:
        shape = np.shape(inputs[spec.name]) if spec.name in inputs else ()
        for axis, size in zip(spec.shape, shape, strict=False):
            if isinstance(axis, str):
                sizes[axis] = size
    first = np.shape(inputs[signature.inputs[0].name]) if signature.inputs[0].name in inputs else ()
    along = signature.length
    return sizes.get("batch", first[0] if first else 1), None if along is None else sizes.get(along.name)


class Router:
    """The open sessions of a bundle, and the choice between its variants. Safe to use from several threads.

    Args:
        bundle: Whose variants.
        threads: Compute threads of each session.
        trusted_digests: SHA-256 digests of the engines that may be opened.
        pinned: The one variant to use, whatever was selected; nothing takes its place.
        check: Open only files that are as the manifest says.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int,
        trusted_digests: frozenset[str],
        pinned: str | None = None,
        check: bool = True,
    ) -> None:
        self.bundle = bundle
        self.check = check
        self.threads = threads
        self.trusted_digests = trusted_digests
        self.pinned = None if pinned is None else bundle.variant(pinned).id
        self.notes: list[str] = []
        self.sessions: dict[str, tuple[Session, threading.Lock]] = {}
        self._routes: dict[str, tuple[Session, threading.Lock]] = {}
        self._refused: dict[str, str] = {}
        self._opening = threading.RLock()
        self._closed = False
        if self.pinned is None and not self._passed():
            raise RequestError(
                "no variant of this bundle passed its gates and has files",
                bundle.path,
                "Read report.html, or name a variant all the same with variant=",
            )

    def selected_for(self, batch: int, length: int | None = None) -> str:
        """The id of the variant that the bundle selected for the nearest operating point, else overall."""
        if self.pinned is not None:
            return self.pinned
        selected = self.bundle.manifest.selected
        point = nearest_point([p for p in self.bundle.points if selected[p] is not None], batch, length)
        chosen = selected[point] if point is not None else selected.get("overall")
        return chosen if chosen is not None else self._passed()[0].id

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """Run inputs on the variant for their shape, or on what takes its place.

        Raises:
            RequestError: Inputs that the model does not take, or the model is closed.
            EnvironmentLackError: No variant can be opened here.
        """
        session, lock = self._session(self.selected_for(*batch_and_length(inputs, self.bundle.signature)))
        with lock:
            self._check_open()
            return session.run(inputs)

    def close(self) -> None:
        """Close all sessions, each after the run that it is in."""
        with self._opening:
            self._closed = True
            for session, lock in self.sessions.values():
                with lock:
                    session.close()
            self.sessions.clear()
            self._routes.clear()

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError("the model was closed", self.bundle.path, "Load the bundle again")

    def _session(self, chosen: str) -> tuple[Session, threading.Lock]:
        self._check_open()
        if (found := self._routes.get(chosen)) is not None:
            return found
        with self._opening:
            self._check_open()
            self._routes[chosen] = self._open_first(self._candidates(chosen))
            return self._routes[chosen]

    def _open_first(self, candidates: list[VariantEntry]) -> tuple[Session, threading.Lock]:
        """Open the first variant that can be; what was refused is remembered, and told once."""
        news: list[str] = []
        for entry in candidates:
            if entry.id not in self.sessions and entry.id not in self._refused:
                try:
                    self.sessions[entry.id] = (self._open(entry), threading.Lock())
                except _OPENING_ERRORS as error:
                    if self.pinned is not None and isinstance(error, PlanishError):
                        raise
                    self._refused[entry.id] = str(error).rstrip(".") or type(error).__name__
                    news.append(entry.id)
            if entry.id in self.sessions:
                if news:
                    self._tell(news, entry.id)
                return self.sessions[entry.id]
        reasons = "; ".join(f"{entry.id}: {self._refused[entry.id]}" for entry in candidates)
        raise EnvironmentLackError(
            "no variant of the bundle can be opened here", reasons, "planish doctor says what each runtime needs"
        )

    def _tell(self, refused: list[str], instead: str) -> None:
        told = ". ".join(f"{name} is not used: {self._refused[name]}" for name in refused)
        note = f"{told}. Using {instead} in {'its' if len(refused) == 1 else 'their'} place"
        self.notes.append(note)
        warnings.warn(note, FallbackWarning, stacklevel=2)

    def _open(self, entry: VariantEntry) -> Session:
        from exporter.targets import get_target

        if self.check:
            refuse(changed_files(self.bundle.path, entry.files, self.bundle.manifest.files))
        target = get_target(entry.target)
        return target.open(
            self.bundle.artifact(entry), entry.variant, threads=self.threads, trusted_digests=self.trusted_digests
        )

    def _candidates(self, chosen: str) -> list[VariantEntry]:
        if self.pinned is not None:
            return [self.bundle.variant(self.pinned)]
        first = [self.bundle.variant(chosen)]
        return first + [entry for entry in self._passed() if entry.id != chosen]

    def _passed(self) -> list[VariantEntry]:
        """Variants that passed: the one selected overall, then the faster ones; of equals portable FP32 ONNX last."""
        overall = self.bundle.manifest.selected.get("overall")
        usable = [entry for entry in self.bundle.manifest.variants if entry.status == "passed" and entry.files]
        # Portable ONNX in FP32 is tried last where nothing says that it is faster.
        return sorted(usable, key=lambda entry: (entry.id != overall, -_speed(entry), entry.id == PORTABLE))


def _speed(entry: VariantEntry) -> float:
    """Geometric mean of a variant's speed-ups, by their lower bounds where known; 0 for one that was not timed."""
    ratios = [point.speedup_low or point.speedup for point in entry.points.values()]
    known = [math.log(ratio) for ratio in ratios if ratio is not None and ratio > 0]
    return math.exp(sum(known) / len(known)) if known else 0.0
