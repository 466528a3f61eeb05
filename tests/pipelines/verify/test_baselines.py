from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter.errors import RequestError
from exporter.original import Original, open_original
from exporter.sources import Source, resolve_source
from exporter.tasks import get_task
from pipelines.verify.baselines import OPENER, TorchSession, open_baseline
from pipelines.verify.latency import Plan, measure
from pipelines.verify.worker_process import WorkerSpec

FACTORY = "tests.pipelines.verify.test_baselines:small_model"


def small_model() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
    return model, {"input": torch.zeros(2, 8)}


def asked(source: Source, mode: str) -> dict[str, Any]:
    limits = {"max_length": None, "max_batch": None, "attends": True, "custom": None}
    return {"original": {"source": source.to_dict(), "task": "custom", **limits}, "mode": mode}


@pytest.fixture(scope="module")
def source() -> Source:
    return resolve_source(FACTORY)


@pytest.fixture(scope="module")
def original(source: Source) -> Original:
    return open_original(source, get_task("custom"))


def inputs(batch: int) -> dict[str, np.ndarray]:
    return {"input": np.random.default_rng(batch).normal(size=(batch, 8)).astype(np.float32)}


def test_the_eager_session_is_the_original_bit_by_bit(original: Original, source: Source) -> None:
    session = open_baseline(asked(source, "eager"), threads=1)
    for batch in (1, 3):
        expected, got = original.run(inputs(batch)), session.run(inputs(batch))
        assert set(got) == set(expected)
        for name in expected:
            np.testing.assert_array_equal(got[name], expected[name])
    assert session.executed()["mode"] == "eager"
    assert torch.get_num_threads() == 1


@pytest.mark.slow
def test_the_compiled_session_was_compiled_and_agrees(original: Original) -> None:
    session = TorchSession(original, "compile", threads=1)
    assert session.executed()["mode"] == "eager"  # nothing has been compiled yet
    expected, got = original.run(inputs(2)), session.run(inputs(2))
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=1e-6)
    ran = session.executed()
    assert ran["mode"] == "compile"
    assert ran["graphs"] >= 1


def test_inputs_are_checked_before_the_module_sees_them(original: Original) -> None:
    with pytest.raises(RequestError):
        TorchSession(original, "eager", threads=1).run({"input": np.zeros((2, 9), np.float32)})


def test_an_unknown_mode_is_refused(source: Source) -> None:
    with pytest.raises(RequestError, match="mode"):
        open_baseline(asked(source, "script"), threads=1)


def test_the_baseline_is_measured_in_a_worker(source: Source, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **inputs(2))
    workers = [WorkerSpec(name, OPENER, asked(source, "eager"), threads=1) for name in ("eager", "again")]
    plan = Plan(rounds=3, min_rounds=3, min_block_ms=5, host_rounds=1)
    result = measure(workers, {"2": tmp_path / "x.npz"}, log=tmp_path / "log", plan=plan)
    assert [worker.error for worker in result.workers.values()] == [None, None]
    assert result.workers["again"].executed["runtime"] == f"torch {torch.__version__}"
