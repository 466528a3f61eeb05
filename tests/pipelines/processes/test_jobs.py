from __future__ import annotations

import math
import os
import time
from pathlib import Path

import pytest

from exporter.errors import EnvironmentLackError, GateError, InternalError, NoSpaceError, RequestError
from pipelines.processes import run_job
from tests.pipelines.processes.jobs_to_run import UnlikeError

HERE = "tests.pipelines.processes.jobs_to_run"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "run.log"


def test_a_job_runs_in_its_own_process_and_group_and_returns_json(log: Path) -> None:
    result = run_job(f"{HERE}:echo", {"text": "ä\n", "list": [1, None]}, log=log)
    assert result.value["arguments"] == {"text": "ä\n", "list": [1, None]}
    assert result.value["parent"] == os.getpid()
    assert result.value["group"] == result.value["pid"] != os.getpgrp()
    assert 0 < result.seconds < 60
    assert 1 << 20 < result.peak_rss_bytes < 1 << 32


def test_numpy_scalars_paths_and_nan_survive(log: Path) -> None:
    value = run_job(f"{HERE}:numbers", {}, log=log).value
    assert value["scalar"] == 1.5
    assert value["path"] == "a/b"
    assert math.isnan(value["nan"])


def test_output_goes_to_the_log_and_progress_to_the_caller(log: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    assert run_job(f"{HERE}:noise", {}, log=log, on_line=lines.append).value == "done"
    run_job(f"{HERE}:noise", {}, log=log)
    assert lines == ["half way"]
    text = log.read_text()
    for phrase in ("said on stdout", "native noise", "UserWarning: a warning", "a log record"):
        assert text.count(phrase) >= 2, phrase
    assert capfd.readouterr() == ("", "")


def test_peak_memory_is_the_jobs_own_not_its_parents(log: Path) -> None:
    import numpy as np

    ballast = np.ones(300 << 20, np.uint8)
    small = run_job(f"{HERE}:echo", {}, log=log).peak_rss_bytes
    large = run_job(f"{HERE}:allocate", {"bytes": 200 << 20}, log=log).peak_rss_bytes
    assert small < ballast.nbytes / 2
    assert large > small + (150 << 20)


@pytest.mark.parametrize(
    ("how", "kind", "fields"),
    [
        ("request", RequestError, ("the key is unknown", "epohcs", "Did you mean epochs?")),
        ("gate", GateError, ("no", None, None)),
        ("lack", EnvironmentLackError, ("no compiler", None, "apt install g++")),
        ("subclass", UnlikeError, ("what", 3, "remedy")),
    ],
)
def test_our_errors_arrive_as_they_were_raised(log: Path, how: str, kind: type, fields: tuple[object, ...]) -> None:
    with pytest.raises(kind) as caught:
        run_job(f"{HERE}:fail", {"how": how}, log=log)
    assert type(caught.value) is kind
    assert (caught.value.what, caught.value.value, caught.value.remedy) == fields


@pytest.mark.parametrize("how", ["disk", "disk-wrapped", "disk-text", "memory"])
def test_a_lack_of_space_or_memory_is_the_environments(log: Path, how: str) -> None:
    with pytest.raises(EnvironmentLackError) as caught:
        run_job(f"{HERE}:fail", {"how": how}, log=log)
    assert ("memory" if how == "memory" else "disk space") in caught.value.what
    if how in ("disk", "disk-wrapped"):
        assert caught.value.value == "/some/file"


@pytest.mark.parametrize(
    ("how", "value"),
    [
        ("value", "ValueError: first line"),
        ("segfault", "SIGSEGV"),
        ("kill", "SIGKILL"),
        ("abort", "SIGABRT"),
        ("exit", "exit status 7"),
        ("sys-exit", "SystemExit: 5"),
    ],
)
def test_every_other_end_is_an_internal_error_that_names_the_log(log: Path, how: str, value: str) -> None:
    with pytest.raises(InternalError) as caught:
        run_job(f"{HERE}:fail", {"how": how}, log=log)
    assert caught.value.value == value
    assert str(log) in (caught.value.remedy or "")
    if how == "value":
        assert "Traceback" in log.read_text()
    if how == "kill":
        assert "out of memory" in (caught.value.remedy or "")


@pytest.mark.parametrize("function", ["no.such.module:f", f"{HERE}:no_such_function", f"{HERE}:not_json"])
def test_a_job_that_cannot_be_called_or_answered_is_an_internal_error(log: Path, function: str) -> None:
    with pytest.raises(InternalError):
        run_job(function, {}, log=log)


def test_threads_and_environment_reach_the_job(log: Path) -> None:
    names = ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "PLANISH_TEST_WORD"]
    value = run_job(
        f"{HERE}:environment", {"names": names}, log=log, threads=3, env={"PLANISH_TEST_WORD": "word"}
    ).value
    assert value == {"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "3", "PLANISH_TEST_WORD": "word"}


def test_beyond_the_memory_limit_is_a_lack_of_memory(log: Path) -> None:
    with pytest.raises(EnvironmentLackError, match="memory"):
        run_job(f"{HERE}:allocate", {"bytes": 4 << 30}, log=log, memory_limit_bytes=1 << 30)


def test_a_silent_job_is_given_up(log: Path) -> None:
    start = time.monotonic()
    with pytest.raises(InternalError, match="no sign of life"):
        run_job(f"{HERE}:sleep", {}, log=log, timeout_s=2)
    assert time.monotonic() - start < 60


def test_a_full_disk_is_told_although_native_code_does_not_say_so(log: Path, small_disk: Path) -> None:
    with pytest.raises(NoSpaceError) as caught:
        run_job(f"{HERE}:save_tensor", {"folder": str(small_disk)}, log=log)
    assert caught.value.value == str(small_disk)
    assert "No space left" not in log.read_text(), "it says so by now: choose another way to fail"
