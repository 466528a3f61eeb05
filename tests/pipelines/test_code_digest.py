from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.errors import InternalError
from pipelines import code_digest as subject
from pipelines.code_digest import code_digest, code_modules

_numbers = itertools.count()


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, Path]]:
    """Writes a package of ours with the given files; gives its name and folder. ``ROOM`` in a file is its name."""

    def make(**files: str) -> tuple[str, Path]:
        name = f"room{next(_numbers)}"
        for path, text in {"__init__": "", **files}.items():
            file = tmp_path / name / f"{path.replace('__in__', '/')}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text.replace("ROOM", name))
        monkeypatch.setattr(subject, "ROOTS", (name,))
        monkeypatch.syspath_prepend(str(tmp_path))
        return name, tmp_path / name

    return make


Room = Callable[..., tuple[str, Path]]


def reached(name: str, module: str) -> set[str]:
    return {m.removeprefix(name).removeprefix(".") for m in code_modules(f"{name}.{module}")}


@pytest.mark.parametrize(
    "text",
    [
        "import ROOM.b",
        "from ROOM.b import thing",
        "from ROOM import b",
        "from . import b",
        "from .b import *",
        "def f():\n    from ROOM import b",
        "class A:\n    def f(self):\n        import ROOM.b as c",
        "import importlib\nm = importlib.import_module('ROOM.b')",
        "from importlib import import_module\nm = import_module('.b', __package__)",
        "JOB = 'ROOM.b:run'",
        "LAZY = {'thing': 'ROOM.b'}",
        "if True:\n    try:\n        import ROOM.b\n    except ImportError:\n        pass",
    ],
)
def test_every_way_to_import(room: Room, text: str) -> None:
    name, folder = room(a=text, b="from ROOM.c import x", c="", d="")
    assert reached(name, "a") == {"", "a", "b", "c"}
    before = code_digest(f"{name}.a")
    (folder / "d.py").write_text("unrelated = 1")
    assert code_digest(f"{name}.a") == before
    (folder / "c.py").write_text("x = 2  # two steps away")
    assert code_digest(f"{name}.a") != before


def test_relative_imports_from_a_deeper_package(room: Room) -> None:
    name, _ = room(sub__in____init__="", sub__in__a="from ..b import x\nfrom .c import y", b="", sub__in__c="", c="")
    assert reached(name, "sub.a") == {"", "sub", "sub.a", "sub.c", "b"}


def test_imports_in_a_circle(room: Room) -> None:
    name, _ = room(a="import ROOM.b", b="import ROOM.a")
    assert reached(name, "a") == {"", "a", "b"} == reached(name, "b")


def test_package_that_registers_by_import(room: Room) -> None:
    name, folder = room(
        kinds__in____init__="from ROOM.kinds import one", kinds__in__one="", kinds__in__two="", a="import ROOM.kinds"
    )
    assert reached(name, "a") == {"", "a", "kinds", "kinds.one"}
    (folder / "kinds/__init__.py").write_text(
        "import importlib, pkgutil\nfor m in pkgutil.iter_modules(__path__): importlib.import_module(m.name)"
    )
    assert reached(name, "a") == {"", "a", "kinds", "kinds.one", "kinds.two"}


def test_package_on_the_way_counts_with_what_runs_not_with_what_it_could_load_later(room: Room) -> None:
    lazy = (
        "import importlib\nimport ROOM.always\nWHERE = {'x': 'ROOM.later'}\n"
        "def __getattr__(name):\n    return importlib.import_module(WHERE[name])\n"
    )
    name, _ = room(__init__=lazy, always="", later="", a="", b="import ROOM")
    assert reached(name, "a") == {"", "a", "always"}
    assert reached(name, "b") == {"", "a", "b", "always", "later"}


def test_types_only_imports_of_a_package_on_the_way_do_not_count(room: Room) -> None:
    name, _ = room(
        __init__="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ROOM.later import x", later="", a=""
    )
    assert reached(name, "a") == {"", "a"}


def test_digest_does_not_depend_on_where_the_code_lies_nor_on_order(room: Room, tmp_path: Path) -> None:
    name, _ = room(a="import ROOM.b", b="", c="")
    assert code_digest(f"{name}.a", f"{name}.c") == code_digest(f"{name}.c:run", f"{name}.a")


def test_functions_stand_for_their_modules() -> None:
    assert code_digest(code_modules) == code_digest("pipelines.code_digest") == code_digest("pipelines.code_digest:x")
    assert {"pipelines.code_digest", "pipelines.digests", "exporter.errors"} <= set(code_modules(code_modules))


def test_a_function_from_outside_counts_with_its_own_file() -> None:
    assert __name__ in code_modules(test_functions_stand_for_their_modules)
    assert "pipelines.code_digest" in code_modules(test_functions_stand_for_their_modules)


@pytest.mark.parametrize("name", ["exporter.no_such", "no_such_top", "pipelines.digests.file_digest"])
def test_no_such_code(name: str) -> None:
    with pytest.raises(InternalError, match="no source file"):
        code_digest(name)


def test_our_own_rooms_parse() -> None:
    """Every module of the three rooms can be digested; the arrow between the rooms holds for what is reached."""
    for root in subject.ROOTS:
        package = Path(__import__(root).__file__ or "")
        for path in package.parent.rglob("*.py"):
            parts = path.relative_to(package.parent.parent).with_suffix("").parts
            modules = code_modules(".".join(part for part in parts if part != "__init__"))
            if root == "exporter":
                assert all(module.startswith("exporter") for module in modules), path
