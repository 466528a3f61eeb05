"""Running the stages of one run: each as a job, its result kept in the cache, its progress told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from exporter.hardware import circumstances, cpu_model, fingerprint, gpu
from exporter.targets.tensorrt_engine import PACKAGES
from pipelines.cache import Cache, StageKey, StageResult, stage_key
from pipelines.lanes import side_by_side
from pipelines.processes import run_job
from pipelines.progress import Progress

T = TypeVar("T")

# What changes what a compiler or a clock says, beside the machine itself.
GPU_VARIABLES = ("CUDA_VISIBLE_DEVICES", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CXX",
    "CXXFLAGS",
    "OMP_PROC_BIND",
    "KMP_AFFINITY",
    "LD_PRELOAD",
    *GPU_VARIABLES,
)
# Threads that wait in a loop starve each other where other programs run too: a job that is not timed lets them sleep.
PATIENT = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
BUILDERS = tuple(name for names in PACKAGES.values() for name in names)
"""TensorRT, by the names of its packages."""
GPU = ("nvidia-ml-py", *BUILDERS)
"""What sessions on a GPU stand on, beside these."""
TORCH = ("torch", "transformers", "safetensors", "tokenizers")
ONNX = ("onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy")


@dataclass(frozen=True)
class Made:
    """What a stage left: its folder, what its function returned, and the identity that later stages depend on."""

    folder: Path
    record: dict[str, Any]
    id: str


@dataclass
class Workshop:
    """What the stages of a run share.

    Attributes:
        cache: Keeps their results.
        progress: Tells the user.
        log: Everything that jobs and native code print goes there.
        threads: Threads of every job.
        lanes: Stages that may run side by side (`together`).
        timeline: Stage, when it began and how long it took in seconds, and whether the cache had it.
    """

    cache: Cache
    progress: Progress
    log: Path
    threads: int
    lanes: int = 1
    timeline: list[dict[str, Any]] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _began: float = field(default_factory=time.monotonic)

    def together(self, works: Sequence[Callable[[], T]]) -> list[T]:
        """Do works that do not need each other, several at a time (`pipelines.lanes.side_by_side`)."""
        return side_by_side(works, self.lanes, self._stop)

    def make(
        self,
        name: str,
        title: str,
        function: str,
        arguments: Mapping[str, Any],
        *,
        inputs: Mapping[str, Any],
        packages: Iterable[str] = (),
        bound_to_machine: bool = False,
    ) -> Made:
        """Run one stage as a job, or take its result from the cache.

        Args:
            name: The stage's name in the cache.
            title: What the user reads.
            function: ``module:function``; it gets `arguments` and its ``folder``.
            arguments: Plain data; paths in it count through `inputs`.
            inputs: Identities of what it reads, and its parameters.
            packages: Packages whose version matters.
            bound_to_machine: It compiles or computes: processor, compiler, threads and environment count too.
        """

        def work(folder: Path) -> dict[str, Any]:
            job = run_job(
                function,
                {**arguments, "folder": str(folder)},
                log=self.log,
                env=PATIENT,
                threads=self.threads,
                on_line=self.progress.update,
                stop=self._stop,
            )
            return dict(job.value)

        return self.keep(
            self.key(name, function, inputs=inputs, packages=packages, bound_to_machine=bound_to_machine), title, work
        )

    def key(
        self,
        name: str,
        code: str | Iterable[str],
        *,
        inputs: Mapping[str, Any],
        packages: Iterable[str] = (),
        bound_to_machine: bool = False,
        timed: bool = False,
    ) -> StageKey:
        """The identity of a stage (see `make`); of one that is `timed`, this very machine and its share of it count."""
        around: dict[str, Any] | None = None
        if bound_to_machine:
            around = {"machine": fingerprint(), "cpu": cpu_model(), "threads": self.threads}
            found = gpu()
            if found["devices"]:  # what is compiled or computed may be for it
                around["gpu"] = {"driver": found["driver"], "devices": found["devices"]}
            around |= circumstances() if timed else {}
        variables = VARIABLES if bound_to_machine else ()
        return stage_key(name, inputs=inputs, code=code, packages=packages, environment=around, variables=variables)

    def keep(self, key: StageKey, title: str, work: Callable[[Path], dict[str, Any]]) -> Made:
        """The result for `key` from the cache, or what `work` makes in the folder that it is given."""

        def working(folder: Path) -> dict[str, Any]:
            with self.progress.step(title):
                return work(folder)

        began = time.monotonic()
        result = self._get_or_make(key, title, working)
        seconds = result.seconds if not result.cached else result.made_seconds
        self._note(key, title, began, seconds, result.cached)
        return Made(result.folder, result.record, key.id)

    def measure(
        self, key: StageKey, title: str, work: Callable[[], dict[str, Any]], worth: Callable[[dict[str, Any]], bool]
    ) -> dict[str, Any]:
        """What `work` finds, or found in an earlier run; only what is `worth` it is kept for later ones."""

        def working(folder: Path) -> dict[str, Any]:
            with self.progress.step(title):
                found = work()
            if not worth(found):
                raise _NotKept(found)
            return found

        began = time.monotonic()
        try:
            result = self._get_or_make(key, title, working)
        except _NotKept as notice:
            self._note(key, title, began, time.monotonic() - began, False)
            return notice.found
        self._note(key, title, began, result.made_seconds, result.cached)
        return result.record

    def _get_or_make(self, key: StageKey, title: str, work: Callable[[Path], dict[str, Any]]) -> StageResult:
        result = self.cache.get_or_make(
            key, work, on_wait=lambda _: self.progress.say(f"{title}: waiting for another run that makes it")
        )
        if result.cached:
            self.progress.say(f"{title}: cached")
        return result

    def _note(self, key: StageKey, title: str, began: float, seconds: float, cached: bool) -> None:
        start_s = began - self._began
        told = {"stage": key.stage, "title": title, "start_s": start_s, "seconds": seconds, "cached": cached}
        self.timeline.append(told)


class _NotKept(Exception):
    """Carries a result past the cache, which keeps nothing of a stage that raises."""

    def __init__(self, found: dict[str, Any]) -> None:
        super().__init__()
        self.found = found
