"""Where a compressed model goes: checked before the work, written whole."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from exporter.errors import PlanishError, RequestError
from pipelines.compress import placing
from pipelines.compress.placing import free_place, put

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "made"
    (folder / "more").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "vocab.txt", "more/part.json"):
        (folder / name).write_text(name, encoding="utf-8")
    return folder


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


WHOLE = ["config.json", "model.safetensors", "more/part.json", "vocab.txt"]


def test_a_model_goes_to_a_new_folder_and_those_above_it_are_made(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "a" / "b" / "model"
    assert free_place(out) == out
    assert list(out.parent.iterdir()) == []
    put(model, out)
    assert names(out) == WHOLE
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE(model.stat().st_mode)


@pytest.mark.parametrize("how", ["folder", "link", "here"])
def test_a_model_goes_into_an_empty_folder(
    tmp_path: Path, model: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a container's mounted one, which cannot be replaced: the folder stays the same."""
    empty = tmp_path / "empty"
    empty.mkdir()
    inode = empty.stat().st_ino
    (tmp_path / "link").symlink_to(empty)
    monkeypatch.chdir(empty)
    put(model, free_place({"folder": empty, "link": tmp_path / "link", "here": Path(".")}[how]))
    assert names(empty) == WHOLE
    assert empty.stat().st_ino == inode


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty folder"])
def test_what_a_killed_copy_left_is_in_nobodys_way(tmp_path: Path, model: Path, there: bool) -> None:
    out = tmp_path / "place" / "model"
    (out if there else out.parent).mkdir(parents=True)
    code = (
        "import os, shutil, sys; from pathlib import Path; from pipelines.compress import placing\n"
        "placing.shutil.copytree = lambda folder, whole: (shutil.copytree, whole.mkdir(), os.kill(os.getpid(), 9))\n"
        "placing.put(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(model), str(out)], check=False, cwd=ROOT)
    assert done.returncode == -9
    assert [path.name for path in (tmp_path / "place").rglob("whole")] == ["whole"], "it was killed in the middle"
    put(model, free_place(out))
    assert names(tmp_path / "place") == [f"model/{name}" for name in WHOLE]


def test_what_is_there_is_not_touched(tmp_path: Path, model: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for taken in ("file", "full", "dangling"):
        for does in (free_place, lambda out: put(model, out)):
            with pytest.raises(RequestError, match="something already where the model is to go"):
                does(tmp_path / taken)
    with pytest.raises(RequestError, match="a file is where a folder is needed"):
        free_place(tmp_path / "file" / "model")
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "mine").read_text() == "mine"


@pytest.mark.parametrize("place", ["/proc/planish/model", "/proc/model", "/sys/model"])
def test_where_nothing_can_be_written_that_is_said_before_the_work(place: str) -> None:
    with pytest.raises(PlanishError) as caught:
        free_place(Path(place))
    assert "hoose another --out" in str(caught.value.remedy)


def test_a_move_that_fails_in_the_middle_leaves_an_empty_folder_empty(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename, moved = tmp_path / "empty", Path.rename, []
    out.mkdir()

    def once(self: Path, target: Path) -> Path:
        if len(moved) == 2:
            raise OSError(28, os.strerror(28), str(target))
        moved.append(target.name)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", once)
    with pytest.raises(PlanishError, match="no space left on the disk"):
        put(model, out)
    assert len(moved) == 2
    assert "config.json" not in moved
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty folder"])
def test_a_copy_that_fails_leaves_nothing(
    tmp_path: Path, model: Path, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "place" / "model"
    (out if there else out.parent).mkdir(parents=True)

    def full(folder: Path, whole: Path) -> None:
        whole.mkdir()
        shutil.copy(folder / "vocab.txt", whole)
        raise OSError(28, os.strerror(28), str(whole))

    monkeypatch.setattr(placing.shutil, "copytree", full)
    with pytest.raises(PlanishError, match="no space left on the disk"):
        put(model, out)
    assert [path for path in (tmp_path / "place").rglob("*") if path != out] == []
