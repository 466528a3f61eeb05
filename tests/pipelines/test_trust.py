from __future__ import annotations

import os
from pathlib import Path

import pytest

from exporter.errors import InternalError, PlanishError
from pipelines.trust import engines_folder, remember_engine, trusted

ONE, TWO = "1" * 64, "a" * 64


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_was_remembered_is_trusted(root: Path) -> None:
    assert trusted() == frozenset()
    assert not root.exists()
    for digest in (ONE, TWO, ONE):
        remember_engine(digest)
    assert trusted() == {ONE, TWO}
    assert (root / "engines" / ONE).read_bytes() == b""
    (root / "engines" / ONE).unlink()
    assert trusted() == {TWO}


def test_only_digests_are_markers(root: Path) -> None:
    remember_engine(ONE)
    (root / "engines" / "notes.txt").touch()
    (root / "engines" / ("b" * 64)).mkdir()
    (root / "engines" / ("c" * 64)).symlink_to(root / "engines" / ONE)
    assert trusted() == {ONE}
    for wrong in ("", "../x", "A" * 64, ONE + "\n"):
        with pytest.raises(InternalError, match="not a SHA-256 digest"):
            remember_engine(wrong)


def test_a_folder_in_which_others_can_write_is_not_trusted(root: Path) -> None:
    remember_engine(ONE)
    engines_folder().chmod(0o777)
    assert trusted() == frozenset()


def test_remembering_never_adopts_what_others_could_have_planted(root: Path) -> None:
    folder = engines_folder()
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    (folder / TWO).touch()
    remember_engine(ONE)
    assert trusted() == {ONE}


def test_a_wide_umask_leaves_the_folder_private() -> None:
    before = os.umask(0)
    try:
        remember_engine(ONE)
    finally:
        os.umask(before)
    assert engines_folder().stat().st_mode & 0o777 == 0o700
    assert trusted() == {ONE}


def test_a_link_in_place_of_the_folder_is_not_followed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / TWO).touch()
    root.mkdir()
    (root / "engines").symlink_to(tmp_path / "elsewhere")
    assert trusted() == frozenset()
    with pytest.raises(PlanishError):
        remember_engine(ONE)


def test_a_file_in_place_of_the_folder(root: Path) -> None:
    root.write_text("")
    assert trusted() == frozenset()
    with pytest.raises(PlanishError, match="a file is where a folder is needed"):
        remember_engine(ONE)
