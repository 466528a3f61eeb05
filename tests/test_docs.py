"""The documentation is true: its recipes validate, its commands parse, its links lead somewhere, its snippets run."""

from __future__ import annotations

import ast
import doctest
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from exporter.original.base import DEFAULT_MAX_BATCH
from exporter.original.plain import open_described, original_arguments
from exporter.sources import resolve_source
from exporter.tasks import get_task
from pipelines import Recipe, load_recipe
from pipelines.cli.commands import app
from pipelines.stages.record import usable_points

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted(ROOT.glob("docs/*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_MAKE_TARGET = re.compile(r"^([a-z-]+):.*## ", re.MULTILINE)


def blocks(language: str) -> list[tuple[str, str]]:
    """Fenced blocks of a language: the page, and the text."""
    found = [(page.name, match) for page in PAGES for match in _FENCE.findall(page.read_text(encoding="utf-8"))]
    return [(name, text) for name, (kind, text) in found if kind == language]


def commands(program: str) -> list[tuple[str, str]]:
    """Command lines of `program` in indented blocks, in `backticks` and in the examples' comments."""
    places = [(page, rf"(?:^    |`)({program} [^`\n]*)") for page in PAGES]
    places += [(page, rf"^\s*#?\s*({program} [a-z][^\n]*)$") for page in (*EXAMPLES, *(ROOT / "examples").glob("*.py"))]
    found = []
    for page, pattern in places:
        for line in re.findall(pattern, page.read_text(encoding="utf-8"), re.MULTILINE):
            found.append((page.name, line.split("  #")[0].strip()))
    return list(dict.fromkeys(found))


def custom_recipes() -> list[str]:
    """The recipes that declare a model of the reader's own, from pages and examples."""
    found = [*(text for _, text in blocks("yaml")), *(path.read_text(encoding="utf-8") for path in EXAMPLES)]
    return [text for text in found if re.search("^custom:", text, re.MULTILINE)]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_recipes_validate_and_their_data_is_there(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.data.evaluation is None or Path(recipe.data.evaluation).is_file()


@pytest.mark.parametrize(("page", "text"), blocks("yaml"))
def test_recipes_in_the_documentation_validate(page: str, text: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text, encoding="utf-8")
    assert load_recipe(recipe).source


@pytest.mark.parametrize("text", custom_recipes())
def test_models_take_the_points_that_the_documentation_shows(text: str, tmp_path: Path) -> None:
    """A point that a model does not take is left out of the measurement, so that a wrong recipe would run."""
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.custom is not None
    asked = original_arguments(resolve_source(recipe.source), get_task("custom"), custom=recipe.custom.model_dump())
    assert usable_points(recipe.latency.points, open_described(asked).signature) == ([*recipe.latency.points], [])


def test_the_reference_names_every_key_and_its_default() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    reference = next(text for _, text in blocks("yaml") if "include_source" in text)
    shown = yaml.safe_load(reference)
    for name, field in Recipe.model_fields.items():
        assert name in shown or f"`{name}" in page, f"recipes.md lacks {name}"
        section = field.annotation
        if isinstance(section, type) and hasattr(section, "model_fields"):
            for key in section.model_fields:
                assert key in shown[name] or f"`{key}`" in page, f"recipes.md lacks {name}.{key}"
    # Lines that are no examples give defaults; the largest batch is the exporter's, where the recipe names none.
    plain = "\n".join(line for line in reference.splitlines() if "# example" not in line)
    given = {key: value for key, value in yaml.safe_load(plain).items() if value is not None}
    defaults = Recipe(source="x").resolved() | {
        "export": {"opset": 20, "external_data": "auto", "max_batch": DEFAULT_MAX_BATCH}
    }
    for key, value in given.items():
        if key == "source":
            continue
        for inner, one in value.items() if isinstance(value, dict) else ():
            assert defaults[key][inner] == one, f"{key}.{inner}"
        assert isinstance(value, dict) or defaults[key] == value, key


@pytest.mark.parametrize(("page", "line"), commands("planish"))
def test_commands_in_the_documentation_parse(page: str, line: str) -> None:
    group = typer.main.get_command(app)
    words = shlex.split(line)[1:]
    if not words or words[0].isupper() or words == ["…"] or words[0].startswith("…"):
        return
    if words[0].startswith("--"):
        group.make_context("planish", words, resilient_parsing=True)
        return
    while hasattr(group, "commands"):
        assert words[:1] != [], f"{page}: {line!r} stops before its command"
        assert words[0] in group.commands, f"{page}: {line!r} names no command"
        group = group.commands[words.pop(0)]
    if words:
        # Parses options and arguments and runs nothing; a word that is not known raises.
        context = group.make_context(line, words)
        for override in context.params.get("sets") or []:
            Recipe.from_source("x", overrides=[override])


@pytest.mark.parametrize(("page", "line"), commands("make"))
def test_make_commands_in_the_documentation_exist(page: str, line: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(_MAKE_TARGET.findall(makefile))
    words = shlex.split(line)[1:]
    for word in words:
        name, equals, _ = word.partition("=")
        if equals:
            assert re.search(rf"^{name} \?=", makefile, re.MULTILINE), f"{page}: {name} is no variable of the Makefile"
        else:
            assert name in targets, f"{page}: {line!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_to_files_resolve(page: Path) -> None:
    for target in _LINK.findall(page.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:", "#")):
            assert (page.parent / target.split("#")[0]).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_sessions_in_the_documentation_give_what_they_show(page: Path) -> None:
    found = doctest.testfile(str(page), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert found.failed == 0


@pytest.mark.parametrize(("page", "text"), [block for block in blocks("python") if ">>>" not in block[1]])
def test_python_in_the_documentation_imports_what_there_is(page: str, text: str) -> None:
    import importlib

    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{page}: {node.module} has no {alias.name}"


def test_the_documentation_shows_something_to_check() -> None:
    assert len(EXAMPLES) >= 2
    assert len(blocks("yaml")) >= 3
    assert len(custom_recipes()) >= 2
    assert len(commands("planish")) >= 15
    assert len(commands("make")) >= 4
