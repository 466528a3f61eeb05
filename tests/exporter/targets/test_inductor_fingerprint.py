from __future__ import annotations

import json
from pathlib import Path

import pytest

from exporter.digests import file_digest
from exporter.errors import RequestError
from exporter.hardware import fingerprint
from exporter.targets.engines import FINGERPRINT
from exporter.targets.inductor import check_engine, misfits


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """Bytes with a fingerprint beside them; the checks end before anything is loaded."""
    path = tmp_path / "model.pt2"
    path.write_bytes(b"native code")
    write_sheet(path, fingerprint())
    return path


def write_sheet(path: Path, found: dict, digest: str | None = None) -> None:
    sheet = {"fingerprint": found, "sha256": digest or file_digest(path)}
    (path.parent / FINGERPRINT).write_text(json.dumps(sheet))


def test_an_engine_of_this_machine_that_is_trusted_may_be_opened(engine: Path) -> None:
    check_engine(engine, frozenset([file_digest(engine)]))


def test_one_that_nobody_trusts_is_refused(engine: Path) -> None:
    with pytest.raises(RequestError, match="not built by your own cache"):
        check_engine(engine, frozenset())


def test_a_changed_byte_is_refused_even_if_the_file_is_trusted(engine: Path) -> None:
    engine.write_bytes(b"native codE")
    with pytest.raises(RequestError, match="not the file that its fingerprint names"):
        check_engine(engine, frozenset([file_digest(engine)]))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"architecture": "riscv64"}, "architecture: built for riscv64"),
        ({"torch": "1.0"}, "torch: built for 1.0"),
        ({"cpu_features": [*fingerprint()["cpu_features"], "zzz_future"]}, "zzz_future"),
    ],
)
def test_each_field_that_does_not_fit_is_named(engine: Path, change: dict, told: str) -> None:
    write_sheet(engine, fingerprint() | change)
    with pytest.raises(RequestError, match="built for another machine") as error:
        check_engine(engine, frozenset([file_digest(engine)]))
    assert told in str(error.value)


def test_more_features_than_needed_and_another_compiler_do_not_matter() -> None:
    here = fingerprint()
    built = here | {"cpu_features": here["cpu_features"][:1], "compiler": "g++ 1.0"}
    assert misfits(built, here) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"fingerprint": {}, "sha256": 1}'])
def test_a_damaged_fingerprint_is_said_to_be_one(engine: Path, text: str) -> None:
    (engine.parent / FINGERPRINT).write_text(text)
    with pytest.raises(RequestError, match="fingerprint of an engine is damaged"):
        check_engine(engine, frozenset([file_digest(engine)]))


def test_an_engine_without_a_fingerprint_is_refused(engine: Path) -> None:
    (engine.parent / FINGERPRINT).unlink()
    with pytest.raises(RequestError, match="missing"):
        check_engine(engine, frozenset([file_digest(engine)]))
