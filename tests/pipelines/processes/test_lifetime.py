"""No process outlives the run that started it, however the run ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.processes import Child, run_job
from tests.pipelines.processes.test_jobs import HERE

ROOT = Path(__file__).resolve().parents[3]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def wait_until_gone(pids: list[int], seconds: float = 20) -> list[int]:
    end = time.monotonic() + seconds
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < end:
        time.sleep(0.02)
    return left


def children_of(pid: int) -> list[int]:
    texts = [task.joinpath("children").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return [int(word) for text in texts for word in text.split()]


def temporary_of(log: Path) -> Path:
    """Where a parent with this log, and what it starts, keep their temporary files."""
    folder = log.parent / "temporary"
    folder.mkdir(exist_ok=True)
    return folder


def none_left_in(folder: Path, seconds: float = 5) -> list[str]:
    end = time.monotonic() + seconds
    while (left := sorted(path.name for path in folder.iterdir())) and time.monotonic() < end:
        time.sleep(0.02)
    return left


class Parent:
    def __init__(self, log: Path, what: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.pipelines.processes.parent", str(log), what],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(temporary_of(log))},
            start_new_session=True,
        )
        self.pids: list[int] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line == "ready\n":
                break
            self.pids += [int(word) for word in line.split()]
        if self.process.poll() is None and what != "leaves":
            self.pids += children_of(self.process.pid)  # the watcher is among them


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "run.log"


@pytest.fixture
def started() -> Iterator[list[Parent]]:
    parents: list[Parent] = []
    yield parents
    for parent in parents:
        for pid in [parent.process.pid, *parent.pids]:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        parent.process.wait()
        assert parent.process.stdout is not None
        parent.process.stdout.close()


@pytest.mark.parametrize("what", ["running", "stopped", "nested", "lanes"])
def test_kill_9_of_the_parent_ends_children_grandchildren_and_watcher(
    log: Path, started: list[Parent], what: str
) -> None:
    parent = Parent(log, what)
    started.append(parent)
    assert len(set(parent.pids)) >= (7 if what in ("nested", "lanes") else 4)
    assert all(alive(pid) for pid in parent.pids)
    assert list(temporary_of(log).rglob("unpacked-*")) != []
    parent.process.kill()
    parent.process.wait()
    assert wait_until_gone(parent.pids) == []
    assert none_left_in(temporary_of(log)) == []


def test_kill_9_is_noticed_although_a_fork_holds_the_pipe_open(log: Path, started: list[Parent]) -> None:
    parent = Parent(log, "forked")
    started.append(parent)
    forked = int(log.with_suffix(".forked").read_text())
    others = [pid for pid in parent.pids if pid != forked]
    parent.process.kill()
    parent.process.wait()
    assert wait_until_gone(others) == []
    os.kill(forked, signal.SIGKILL)


def test_the_group_is_ended_by_the_watcher_alone_when_the_kernels_signal_cannot(
    log: Path, started: list[Parent]
) -> None:
    """A grandchild gets no parent-death signal: its own parent is killed at the same moment."""
    parent = Parent(log, "running")
    started.append(parent)
    for pid in (parent.pids[0], parent.process.pid):
        os.kill(pid, signal.SIGSTOP)
    parent.process.kill()
    parent.process.wait()
    assert wait_until_gone(parent.pids) == []


def test_a_parent_that_ends_normally_takes_its_children_and_watcher_along(log: Path, started: list[Parent]) -> None:
    parent = Parent(log, "leaves")
    started.append(parent)
    assert parent.process.wait(60) == 0
    assert wait_until_gone(parent.pids) == []
    assert none_left_in(temporary_of(log)) == []


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGHUP, 129)]
)
@pytest.mark.parametrize("what", ["running", "lanes"])
def test_an_interrupt_ends_everything_and_then_the_parent(
    log: Path, started: list[Parent], number: int, status: int, what: str
) -> None:
    parent = Parent(log, what)
    started.append(parent)
    os.kill(parent.process.pid, number)
    assert parent.process.wait(20) == status
    assert wait_until_gone(parent.pids) == []
    assert none_left_in(temporary_of(log)) == []


def test_descendants_that_a_finished_job_left_are_ended(log: Path) -> None:
    lines: list[str] = []
    run_job(f"{HERE}:family", {"leave": True}, log=log, on_line=lines.append)
    pids = [int(word) for word in lines[0].split()]
    assert len(pids) == 3
    assert wait_until_gone(pids, seconds=2) == []


def test_a_stopped_child_uses_no_processor_time_and_continues(log: Path) -> None:
    with Child(f"{HERE}:spin", {}, log=log) as child:
        child.receive(60)
        child.suspend()
        assert Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        before = _cpu_ticks(child.pid)
        time.sleep(0.3)
        assert _cpu_ticks(child.pid) == before
        child.resume()
        end = time.monotonic() + 20
        while _cpu_ticks(child.pid) == before and time.monotonic() < end:
            time.sleep(0.02)
        assert _cpu_ticks(child.pid) > before
    assert child.returncode == -signal.SIGKILL
    assert not alive(child.pid)


def test_a_killed_watcher_is_replaced(log: Path) -> None:
    run_job(f"{HERE}:echo", {}, log=log)
    from pipelines.processes import tree

    first = tree._tree()._process
    assert first is not None
    first.kill()
    first.wait()
    with Child(f"{HERE}:sleep", {}, log=log) as child:
        child.receive(60)
        second = tree._tree()._process
        assert second is not None
        assert second.pid != first.pid
        assert second.poll() is None


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
