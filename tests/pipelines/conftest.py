"""One cache and two bundles that the tests of the main job share. Read them; copy one before changing it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.locks import FileLock
from tests.pipelines.jobs import TEXTS, export, texts_file

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
def bundle(model_folder: Folders, cache: Path, texts: Path, common: Path) -> Path:
    """A sentence encoder for ONNX Runtime, its weights included, made by an undisturbed run."""

    def make(out: Path) -> None:
        done = export(model_folder("bert"), out, cache, "include_source=true", options=["--data", texts])
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
