"""One cache and two bundles that the tests of the main job share. Read them; copy one before changing it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.cli import run_command
from pipelines.locks import FileLock
from tests.pipelines.jobs import ENCODER, TEXTS, export, texts_file

Folders = Callable[..., Path]


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this test session, one for all its processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "common"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def cache(common: Path) -> Path:
    """The stage cache of all runs that nothing disturbs."""
    return common / "cache"


@pytest.fixture(scope="session")
def texts(common: Path) -> Path:
    """A dozen sentences without labels."""
    return _once(common / "texts.jsonl", texts_file)


@pytest.fixture(scope="session")
def labelled_texts(common: Path) -> Path:
    """Three dozen sentences with labels."""
    labels = ("good", "bad", "fair", "bad", "good")
    many = [*TEXTS, *(f"Again: {text}" for text in TEXTS), *(f"{text} And so on." for text in TEXTS)]
    return _once(
        common / "labelled.jsonl",
        lambda path: texts_file(path, many, [labels[i % len(labels)] for i in range(len(many))]),
    )


@pytest.fixture(scope="session")
def hostile(model_folder: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of which the product behind the first layer's attention is lost in INT8 and INT4, and no other."""
    from tests.pipelines.planted import plant_outliers

    return plant_outliers(model_folder("bert"), tmp_path_factory.mktemp("hostile") / "bert", (0,), 1, 1e4)


@pytest.fixture(scope="session")
def bundle(model_folder: Folders, cache: Path, texts: Path, common: Path) -> Path:
    """A sentence encoder for ONNX Runtime, its weights included, made by an undisturbed run."""

    def make(out: Path) -> None:
        done = export(model_folder("bert"), out, cache, *ENCODER, options=["--data", texts])
        assert done.returncode == 0, done.stderr

    return _once(common / "encoder", make)


@pytest.fixture(scope="session")
def classifier(model_folder: Folders, cache: Path, labelled_texts: Path, common: Path) -> Path:
    """A classifier with labelled data, for ONNX Runtime and as a compiled engine."""
    both = "targets=[onnxruntime-cpu, inductor-cpu]"

    def make(out: Path) -> None:
        done = export(model_folder("bert-classifier"), out, cache, both, options=["--data", labelled_texts])
        assert done.returncode == 0, done.stderr

    return _once(common / "classifier", make)


def _once(place: Path, make: Callable[[Path], object]) -> Path:
    """`place`, which the first process of the session that wants it makes, while the others wait."""
    lock = FileLock(place.with_name(f".{place.name}.lock"))
    lock.acquire()
    try:
        if not place.exists():
            make(place)
    finally:
        lock.release()
    return place


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``here(*arguments)``: the command line in this process: exit status, stdout, stderr."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        status = run_command([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting a small file system needs privileges: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)
