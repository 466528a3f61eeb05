"""What a person reads while a run goes on."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading

import pytest

from pipelines.progress import Progress

TWO = """
import threading, time
from pipelines.progress import Progress
progress = Progress()
both = threading.Barrier(2)
def work(name):
    with progress.step(name):
        both.wait()
        progress.update(f"part of [{name}]")
        both.wait()
        time.sleep(0.4)
threads = [threading.Thread(target=work, args=(name,)) for name in ("Export", "Compile")]
for thread in threads: thread.start()
for thread in threads: thread.join()
progress.say("over")
"""


def test_steps_side_by_side_share_the_live_line_of_a_terminal() -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", TWO], stderr=follower, env={**os.environ, "COLUMNS": "120"})
    os.close(follower)
    shown = b""
    while True:
        try:
            data = os.read(leader, 4096)
        except OSError:  # the other side is closed
            break
        if not data:
            break
        shown += data
    os.close(leader)
    assert process.wait(60) == 0
    text = shown.decode()
    assert any("part of [Export]" in line and "part of [Compile]" in line for line in text.split("\r")), text
    assert "Export: done in" in text
    assert "Compile: done in" in text
    assert "over" in text


def test_without_a_terminal_every_step_has_lines_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()

    def work(name: str) -> None:
        with progress.step(name):
            progress.update("no line for this")
            both.wait(30)

    both = threading.Barrier(2)
    threads = [threading.Thread(target=work, args=(name,)) for name in ("Export", "Compile")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told = capsys.readouterr().err
    assert "no line for this" not in told
    assert sorted(line.split("] ")[1] for line in told.splitlines()) == ["Compile …", "Export …"]


def test_without_a_terminal_a_long_step_says_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("pipelines.progress.time.monotonic", lambda: clock[0])
    progress = Progress()
    with progress.step("Measure latency"):
        for number in range(1, 10):
            progress.update(f"round {number}")
            clock[0] += 12
    told = [line.split("] ")[1] for line in capsys.readouterr().err.splitlines()]
    rounds = ["Measure latency: round 4", "Measure latency: round 7"]
    assert told == ["Measure latency …", *rounds, "Measure latency: done in 108.0 s"]


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(quiet=True)
    with progress.step("Export"):
        progress.update("part")
    progress.say("over")
    assert capsys.readouterr().err == ""
