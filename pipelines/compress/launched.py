"""Compression on several devices or machines: the same recipe, started by ``accelerate launch`` or ``torchrun``.

    torchrun --nproc-per-node 4 -m pipelines.compress recipe.yaml --out student

Every process runs this. The first one owns the cache: it says to the others what is there already and what all of them
train together. So what is trained here is found by a later ``planish run`` of the same recipe on the same cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from pipelines.compress.ranks import is_first
from pipelines.compress.run import FUNCTIONS
from pipelines.job import function_named
from pipelines.workshop import Made, Workshop

TOGETHER = frozenset(FUNCTIONS.values())
"""Stages that all processes do together, others are done by the first alone."""
_WAIT = timedelta(hours=24)
"""For the first process, which may be asking a teacher or exporting meanwhile."""


class Ranks(Workshop):
    """A workshop of several processes: a stage's function runs in them, not in a job of its own."""

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
        if not is_first():
            return _follow(function, arguments)
        key = self.key(name, function, inputs=inputs, packages=packages, bound_to_machine=bound_to_machine)

        def work(folder: Path) -> dict[str, Any]:
            if function in TOGETHER:
                _tell({"work": str(folder)})
            return dict(function_named(function)({**arguments, "folder": str(folder)}))

        made = self.keep(key, title, work)
        _tell({"made": {"folder": str(made.folder), "record": made.record, "id": made.id}})
        return made


def join() -> None:
    """Connect the processes that a launcher started."""
    import torch
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available(), timeout=_WAIT)


def leave() -> None:
    """Disconnect them."""
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _follow(function: str, arguments: Mapping[str, Any]) -> Made:
    """What another process than the first does for a stage: train with it where it trains, and wait for the result."""
    told = _hear()
    if "work" in told:
        function_named(function)({**arguments, "folder": told["work"]})
        told = _hear()
    return Made(Path(told["made"]["folder"]), told["made"]["record"], told["made"]["id"])


def _tell(message: dict[str, Any]) -> None:
    from accelerate.utils import broadcast_object_list

    broadcast_object_list([message])


def _hear() -> dict[str, Any]:
    from accelerate.utils import broadcast_object_list

    heard: list[Any] = [None]
    broadcast_object_list(heard)
    return dict(heard[0])
