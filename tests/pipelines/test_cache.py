from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import EnvironmentLackError, InternalError, RequestError
from pipelines.cache import Cache, default_root, stage_key
from pipelines.cache_entry import RECORD, StageKey


def key(stage: str = "export", **inputs: Any) -> StageKey:
    return stage_key(stage, inputs=inputs, code="pipelines.disk")


def make_file(text: str = "hello") -> Any:
    def make(folder: Path) -> dict[str, Any]:
        (folder / "below").mkdir()
        (folder / "below/model.onnx").write_text(text)
        return {"file": "below/model.onnx", "text": text}

    return make


def never(folder: Path) -> dict[str, Any]:
    raise AssertionError("made again")


def leftovers(root: Path) -> list[str]:
    return sorted(p.name for p in (root / "tmp").iterdir())


def test_made_once_then_reused(tmp_path: Path) -> None:
    with Cache(tmp_path) as cache:
        first = cache.get_or_make(key(), make_file())
        assert not first.cached
        assert (first.folder / first.record["file"]).read_text() == "hello"
        assert cache.get_or_make(key(), never).cached
    with Cache(tmp_path) as cache:
        again = cache.get_or_make(key(), never, verify=True)
    assert again.cached
    assert again.record == first.record
    assert again.folder == first.folder
    assert leftovers(tmp_path) == []


def test_root_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "x"))
    assert default_root() == tmp_path / "x"
    monkeypatch.delenv("PLANISH_CACHE")
    assert default_root() == Path.home() / ".cache/planish"


def test_key_depends_on_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(stage: str = "s", a: int = 1, **more: Any) -> str:
        return stage_key(stage, inputs={"a": a}, **{"code": "pipelines.disk", **more}).digest

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    keys = [
        make(),
        make(stage="t"),
        make(a=2),
        make(code="pipelines.locks"),
        make(packages=["numpy"]),
        make(packages=["no-such-package"]),
        make(environment={"threads": 2}),
        make(variables=["OMP_NUM_THREADS"]),
    ]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    keys.append(make(variables=["OMP_NUM_THREADS"]))
    assert len(set(keys)) == len(keys)
    assert make() == make(packages=[])


def test_key_must_be_plain_data() -> None:
    for wrong in (Path("x"), float("nan"), {1, 2}):
        with pytest.raises(InternalError):
            _ = key(a=wrong).digest
    with pytest.raises(InternalError):
        key("../up")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, RequestError])
def test_failed_stage_leaves_nothing_and_can_be_repeated(tmp_path: Path, error: type[BaseException]) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        (folder / "half").write_text("x")
        raise error("no")

    with Cache(tmp_path) as cache:
        with pytest.raises(error):
            cache.get_or_make(key(), fail)
        assert leftovers(tmp_path) == []
        assert cache.ls() == []
        assert not cache.get_or_make(key(), make_file()).cached


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: ["not a dict"],
        lambda folder: {"x": Path("x")},
        lambda folder: {"x": float("inf")},
        lambda folder: {"path": str(folder / "model.onnx")},
        lambda folder: {"link": (folder / "link").symlink_to("/etc/hosts")},
        lambda folder: {"characters": (folder / RECORD).write_text("{}")},
    ],
)
def test_stage_that_breaks_the_rules_is_a_bug(tmp_path: Path, make: Any) -> None:
    with Cache(tmp_path) as cache:
        with pytest.raises(InternalError):
            cache.get_or_make(key(), make)
        assert leftovers(tmp_path) == []
        assert cache.ls() == []


def _flip(path: Path, keep_time: bool) -> None:
    state = path.stat()
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    else:
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1_000_000_000))


@pytest.mark.parametrize(
    "damage",
    [
        lambda e: (e / "below/model.onnx").unlink(),
        lambda e: (e / "below/model.onnx").write_text("longer than before"),
        lambda e: _flip(e / "below/model.onnx", keep_time=False),
        lambda e: (e / RECORD).unlink(),
        lambda e: (e / RECORD).write_bytes((e / RECORD).read_bytes()[:-40]),
        lambda e: (e / RECORD).write_text((e / RECORD).read_text().replace("hello", "jello")),
        lambda e: (e / RECORD).write_text("[]"),
        lambda e: ((e / "below/model.onnx").unlink(), (e / "below/model.onnx").symlink_to("/etc/hosts")),
    ],
)
def test_damaged_entry_is_made_anew(tmp_path: Path, damage: Any) -> None:
    with Cache(tmp_path) as cache:
        damage(cache.get_or_make(key(), make_file()).folder)
    with Cache(tmp_path) as cache:
        again = cache.get_or_make(key(), make_file())
        assert not again.cached
        assert (again.folder / "below/model.onnx").read_text() == "hello"
        assert cache.get_or_make(key(), never).cached
    assert leftovers(tmp_path) == []


def test_damage_that_keeps_size_and_time_is_found_on_demand(tmp_path: Path) -> None:
    with Cache(tmp_path) as cache:
        _flip(cache.get_or_make(key(), make_file()).folder / "below/model.onnx", keep_time=True)
        assert cache.get_or_make(key(), never).cached
        assert not cache.get_or_make(key(), make_file(), verify=True).cached


def test_touched_but_equal_file_is_still_good(tmp_path: Path) -> None:
    with Cache(tmp_path) as cache:
        os.utime(cache.get_or_make(key(), make_file()).folder / "below/model.onnx")
        assert cache.get_or_make(key(), never).cached


def test_entry_renamed_to_another_key_is_not_taken(tmp_path: Path) -> None:
    with Cache(tmp_path) as cache:
        folder = cache.get_or_make(key(a=1), make_file()).folder
        os.rename(folder, folder.with_name(key(a=2).id))
        assert not cache.get_or_make(key(a=2), make_file("other")).cached


CHILD = """
import sys, time
from pathlib import Path
from pipelines.cache import Cache, stage_key

root, number, work_s = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])

def make(folder):
    (folder / "half").write_bytes(b"x" * 100000)
    print("making", flush=True)
    time.sleep(work_s)
    return {"by": number}

key = stage_key("slow", inputs={"n": 1}, code="pipelines.disk")
with Cache(root) as cache:
    result = cache.get_or_make(key, make, on_wait=lambda key: print("waiting", key.stage, flush=True))
    print("done", result.record["by"], result.cached, flush=True)
    if len(sys.argv) > 4:
        sys.stdin.readline()
"""


class Child:
    def __init__(self, root: Path, number: int, work_s: float, *more: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(root), str(number), str(work_s), *more],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def children() -> Iterator[list[Child]]:
    started: list[Child] = []
    yield started
    for child in started:
        child.end()


def test_kill_9_in_the_middle_of_a_stage(tmp_path: Path, children: list[Child]) -> None:
    victim = Child(tmp_path, 1, 600)
    children.append(victim)
    assert victim.line() == "making"
    assert len(leftovers(tmp_path)) == 1
    victim.process.send_signal(signal.SIGKILL)
    victim.process.wait()
    assert len(leftovers(tmp_path)) == 1
    assert not any((tmp_path / "stages").iterdir())
    heir = Child(tmp_path, 2, 0)
    children.append(heir)
    assert [heir.line(), heir.line()] == ["making", "done 2 False"]
    assert leftovers(tmp_path) == []


def test_leftovers_of_a_living_process_stay(tmp_path: Path, children: list[Child]) -> None:
    child = Child(tmp_path, 1, 600)
    children.append(child)
    assert child.line() == "making"
    with Cache(tmp_path) as cache:
        cache.get_or_make(key(), make_file())
        cache.clean(everything=True)
        assert len(leftovers(tmp_path)) == 1


def test_second_process_waits_says_so_and_reuses(tmp_path: Path, children: list[Child]) -> None:
    first = Child(tmp_path, 1, 1.5)
    children.append(first)
    assert first.line() == "making"
    second = Child(tmp_path, 2, 0)
    children.append(second)
    assert second.line() == "waiting slow"
    assert second.line() == "done 1 True"
    assert first.line() == "done 1 False"


def test_waiting_process_takes_over_from_a_killed_one(tmp_path: Path, children: list[Child]) -> None:
    first, second = Child(tmp_path, 1, 600), None
    children.append(first)
    assert first.line() == "making"
    second = Child(tmp_path, 2, 0)
    children.append(second)
    assert second.line() == "waiting slow"
    first.process.send_signal(signal.SIGKILL)
    assert [second.line(), second.line()] == ["making", "done 2 False"]


def test_clean_leaves_what_a_process_reads(tmp_path: Path, children: list[Child]) -> None:
    child = Child(tmp_path, 1, 0, "stay")
    children.append(child)
    assert [child.line(), child.line()] == ["making", "done 1 False"]
    with Cache(tmp_path) as cache:
        (entry,) = cache.ls()
        assert entry.in_use
        assert entry.stage == "slow"
        assert entry.size_bytes > 100_000
        cleaned = cache.clean(everything=True)
        assert (cleaned.removed, cleaned.in_use) == ((), (entry.id,))
        child.end()
        cleaned = cache.clean(everything=True)
        assert cleaned.removed == (entry.id,)
        assert cleaned.freed_bytes == entry.size_bytes
        assert cache.ls() == []
    assert leftovers(tmp_path) == []
    assert list((tmp_path / "locks").iterdir()) == []


def test_clean_by_age_and_broken_entries(tmp_path: Path) -> None:
    with Cache(tmp_path) as cache:
        for n in range(3):
            cache.get_or_make(key(n=n), make_file())
        broken = cache.get_or_make(key(n=3), make_file()).folder
    (broken / RECORD).unlink()
    old = tmp_path / "locks" / f"{key(n=0).id}.use"
    os.utime(old, (time.time() - 1000, time.time() - 1000))
    with Cache(tmp_path) as cache:
        assert {e.id: e.sound for e in cache.ls()}[broken.name] is False
        assert cache.ls()[-1].id == key(n=0).id
        assert set(cache.clean(older_than_s=900).removed) == {key(n=0).id, broken.name}
        assert {e.id for e in cache.ls()} == {key(n=1).id, key(n=2).id}


def test_ls_and_clean_of_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "none")
    assert cache.ls() == []
    assert cache.clean(everything=True).removed == ()
    assert not (tmp_path / "none").exists()


def test_disabled_cache_is_private_and_goes_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "public"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Cache.disabled() as cache:
        assert not cache.get_or_make(key(), make_file()).cached
        assert cache.get_or_make(key(), never).cached
        assert stat.S_IMODE(cache.root.stat().st_mode) == 0o700
        with Cache.disabled() as other:
            assert other.root != cache.root
            assert cache.root.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_disabled_cache_of_a_killed_run_is_removed_by_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, children: list[Child]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = "import os,signal; from pipelines.cache import Cache; Cache.disabled(); os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}, check=False)
    assert len(list(tmp_path.iterdir())) == 1
    Cache.disabled().close()
    assert list(tmp_path.iterdir()) == []


def test_full_disk_in_the_stage(small_disk: Path) -> None:
    def fill(folder: Path) -> dict[str, Any]:
        (folder / "big").write_bytes(b"x" * (1 << 20))
        return {}

    with Cache(small_disk) as cache:
        with pytest.raises(EnvironmentLackError, match="no space left") as caught:
            cache.get_or_make(key(), fill)
        assert str(small_disk) in str(caught.value)
        assert leftovers(small_disk) == []
        assert cache.ls() == []
        assert not cache.get_or_make(key(), make_file()).cached


def test_full_disk_when_the_record_is_written(small_disk: Path) -> None:
    def fill(folder: Path) -> dict[str, Any]:
        (folder / "big").write_bytes(b"x" * shutil.disk_usage(folder).free)
        assert shutil.disk_usage(folder).free == 0
        return {}

    with Cache(small_disk) as cache:
        with pytest.raises(EnvironmentLackError, match="no space left"):
            cache.get_or_make(key(), fill)
        assert leftovers(small_disk) == []
        assert cache.ls() == []


def test_full_disk_told_by_native_code_only_in_words(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : write failed: No space left on device")

    with Cache(tmp_path) as cache, pytest.raises(EnvironmentLackError, match="no space left"):
        cache.get_or_make(key(), fail)


def test_read_only_root(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for root in (small_disk, small_disk / "below/it"):
        with pytest.raises(EnvironmentLackError, match=r"not allowed.*Set PLANISH_CACHE"):
            Cache(root).get_or_make(key(), never)


def test_file_where_the_root_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(RequestError, match="a file is where a folder is needed"):
            Cache(root).get_or_make(key(), never)


def test_trouble_inside_a_stage_is_not_blamed_on_the_cache(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        (folder / "x").write_text("")
        (folder / "x").mkdir()
        return {}

    with Cache(tmp_path) as cache, pytest.raises(FileExistsError):
        cache.get_or_make(key(), fail)


def test_record_says_what_the_entry_depends_on(tmp_path: Path) -> None:
    with Cache(tmp_path) as cache:
        folder = cache.get_or_make(key(a=5), make_file()).folder
    record = json.loads((folder / RECORD).read_text())
    assert record["key"]["inputs"] == {"a": 5}
    assert record["files"]["below/model.onnx"]["bytes"] == 5


def test_checkpoints_of_an_interrupted_training_are_cleaned_as_entries_are(tmp_path: Path) -> None:
    checkpoint = tmp_path / "training" / "compress-distil-0" / "checkpoint-7"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"x" * 100)
    with Cache(tmp_path) as cache:
        assert cache.clean(older_than_s=3600).removed == ()
        done = cache.clean(everything=True)
    assert done.removed == ("training/compress-distil-0",)
    assert done.freed_bytes == 100
    assert not checkpoint.exists()
