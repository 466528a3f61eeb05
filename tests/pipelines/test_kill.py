"""A run that is killed or interrupted, at any moment, loses at most the stage at work, and leaves no process behind."""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import pytest

from pipelines.bundle import check_integrity
from pipelines.cache import Cache
from tests.pipelines.jobs import COMMAND, digests, environment, export, marked, none_left, settings, verdicts

pytestmark = pytest.mark.slow
Folders = Callable[..., Path]


class Job:
    """``planish export`` at work in a session of its own; every process that it starts carries its marker."""

    def __init__(self, source: Path, out: Path, cache: Path, data: Path, *more: str) -> None:
        self.marker = f"planish-test-{secrets.token_hex(8)}"
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._over = False
        self.process = subprocess.Popen(
            [*COMMAND, "export", str(source), "--out", str(out), "--data", str(data), *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(cache, PLANISH_TEST_MARKER=self.marker),
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def wait_for(self, *texts: str, patience_s: float = 300.0) -> None:
        """Wait until a line of stderr holds one of `texts`."""
        with self._news:
            self._news.wait_for(lambda: self._over or self.said(*texts), patience_s)
        assert self.said(*texts), (texts, self.lines)

    def said(self, *texts: str) -> bool:
        return any(text in line for line in self.lines for text in texts)

    def kill(self) -> None:
        """``kill -9`` of the main process alone, and see that everything else goes too."""
        self.process.kill()
        assert self.process.wait(30) == -signal.SIGKILL, self.lines
        assert none_left(self.marker) == []
        self._reader.join(10)

    def interrupt(self, group: bool) -> tuple[int, float]:
        """Ctrl-C, to the process group (as a terminal does) or to the process; exit status and seconds until then."""
        began = time.monotonic()
        (os.killpg if group else os.kill)(self.process.pid, signal.SIGINT)
        status = self.process.wait(60)
        seconds = time.monotonic() - began
        self._reader.join(10)
        return status, seconds

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._over = True
            self._news.notify_all()


def absent_or_whole(out: Path) -> None:
    assert not out.exists() or check_integrity(out) == []


def sound(cache: Path) -> None:
    """Every entry is what was written, and nothing half-made is left once the next run began."""
    assert [entry.id for entry in Cache(cache).ls() if not entry.sound] == []
    # The tests of another process may be at work in the same cache; that of the job is over.
    left = [entry.name for entry in (cache / "tmp").iterdir()]
    assert [name for name in left if not Path("/proc", name.rsplit("-", 2)[1]).exists()] == []


def timeline(bundle: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((bundle / "report.json").read_text(encoding="utf-8"))["timeline"]
    return found


def test_killed_inside_every_stage_and_at_random_moments(
    bundle: Path, model_folder: Folders, texts: Path, tmp_path: Path
) -> None:
    """Each run goes on where the one before was killed; the last one ends as the undisturbed run did."""
    source, out, cache = model_folder("bert"), tmp_path / "made" / "out", tmp_path / "cache"
    moments = random.Random(20261123)
    kills, inside = 0, set()

    def job() -> Job:
        return Job(source, out, cache, texts, *settings("include_source=true"))

    stages = timeline(bundle)
    together = {"record", "export-onnx"}, {"check-onnxruntime-cpu-fp32", "check-onnxruntime-cpu-fp32-fused"}
    order = [stage["stage"] for stage in stages]
    assert [set(order[:2]), *order[2:4], set(order[4:6]), *order[6:]] == [
        together[0],
        "optimize",
        "fuse",
        together[1],
        "race",
    ]
    for number, stage in enumerate(stages):
        with job() as at_random:
            time.sleep(moments.uniform(0.0, 3.0))
            at_random.kill()
        kills += 1
        absent_or_whole(out)
        for attempt in range(4):
            with job() as at_work:
                at_work.wait_for(f"{stage['title']} …")
                time.sleep(moments.uniform(0.0, 0.4) * stage["seconds"] / (attempt + 1))
                at_work.kill()
            kills += 1
            absent_or_whole(out)
            if not at_work.said(f"{stage['title']}: done"):
                inside.add(stage["stage"])
                break
            for later in stages[number:]:  # it was faster: once more
                for entry in (cache / "stages").glob(f"{later['stage']}-*"):
                    shutil.rmtree(entry)
    assert inside == {stage["stage"] for stage in stages}
    with job() as racing:  # while workers are stopped, which could not notice that they are orphans
        racing.wait_for("Measure latency …")
        end = time.monotonic() + 120
        while not stopped(racing.marker) and racing.process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        racing.kill()
    kills += 1
    for _ in range(4):  # while the bundle is written; timings of a busy machine are not kept
        with job() as writing:
            writing.wait_for("Measure latency: cached", "Measure latency: done")
            time.sleep(moments.uniform(0.0, 0.15))
            if writing.process.poll() is None:
                writing.kill()
                kills += 1
        absent_or_whole(out)
        shutil.rmtree(out, ignore_errors=True)
    with job() as last:
        assert last.process.wait(300) == 0, last.lines
    assert kills >= 10
    assert none_left(last.marker) == []
    assert {entry["stage"] for entry in timeline(out) if not entry["cached"]} <= {"race"}, last.lines
    assert digests(out / "onnx") == digests(bundle / "onnx")
    assert digests(out / "variants") == digests(bundle / "variants")
    assert digests(out).keys() == digests(bundle).keys()
    assert verdicts(out) == verdicts(bundle)
    assert check_integrity(out) == []
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    sound(cache)


def stopped(marker: str) -> bool:
    """Whether a process of a run stands still (SIGSTOP)."""
    for entry in marked(marker):
        try:
            if psutil.Process(int(entry.partition(":")[0])).status() == psutil.STATUS_STOPPED:
                return True
        except psutil.Error:
            continue
    return False


@pytest.mark.parametrize("group", [True, False], ids=["group", "process"])
@pytest.mark.parametrize(
    ("moment", "change"),
    [
        ("log in", "export.opset=19"),  # between the first line and the first stage
        ("Export to ONNX …", "export.opset=19"),
        ("Measure latency …", "latency.budget_s=60.0"),
    ],
    ids=["start", "export", "race"],
)
def test_ctrl_c(
    bundle: Path, cache: Path, model_folder: Folders, texts: Path, tmp_path: Path, moment: str, change: str, group: bool
) -> None:
    source, out = model_folder("bert"), tmp_path / "out"
    with Job(source, out, cache, texts, *settings("include_source=true", change)) as job:
        job.wait_for(moment)
        time.sleep(random.Random(f"{moment} {group}").uniform(0.0, 2.0) if moment.endswith("…") else 0.0)
        status, seconds = job.interrupt(group)
        assert status == 130, job.lines
        assert seconds < 2.0
        assert none_left(job.marker) == []
        assert any(line.startswith("error: interrupted") for line in job.lines), job.lines
        assert not job.said("Traceback"), job.lines
    assert list(tmp_path.iterdir()) == []
    sound(cache)
    done = export(source, out, cache, "include_source=true", options=["--data", texts, "--quiet"])
    assert (done.returncode, done.stderr) == (0, "")
    assert {entry["stage"] for entry in timeline(out) if not entry["cached"]} <= {"race"}


def test_ctrl_c_is_told_as_json(bundle: Path, cache: Path, model_folder: Folders, texts: Path, tmp_path: Path) -> None:
    asked = settings("latency.budget_s=60.0")
    with Job(model_folder("bert"), tmp_path / "out", cache, texts, *asked, "--json") as job:
        job.wait_for("Measure latency …")
        assert job.interrupt(group=True)[0] == 130
        assert job.process.stdout is not None
        assert json.loads(job.process.stdout.read())["error"]["exit"] == 130
    assert not (tmp_path / "out").exists()
