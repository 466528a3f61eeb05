from __future__ import annotations

from pathlib import Path

from pipelines.recipe import Recipe
from pipelines.recording import _named_now
from pipelines.runner import _data
from pipelines.workshop import Made


def test_what_identifies_the_data_says_how_they_are_read(tmp_path: Path) -> None:
    identities = []
    for name in ("a.csv", "b.csv", "a.txt"):
        (tmp_path / name).write_text("text\nhello\n")
        recipe = Recipe(source="a:b", data={"evaluation": str(tmp_path / name)})
        identities.append(_data(recipe, recipe.resolved()["data"]["sha256"])[1])
    assert identities[0] == identities[1] != identities[2]


def test_data_have_the_name_of_this_run(tmp_path: Path) -> None:
    kept = Made(tmp_path, {"points": ["8"], "data": {"origin": "old.csv", "rows": 3}}, "record-1")
    found = _named_now(kept, {"path": "/home/me/new.csv", "split": None})
    assert found.record == {"points": ["8"], "data": {"origin": "new.csv", "rows": 3}}
    assert _named_now(kept, {"path": "/home/me/folder", "split": "test"}).record["data"]["origin"] == "test"
    assert _named_now(kept, {"path": None}) == kept
