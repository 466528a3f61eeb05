"""The digest of the code behind a stage: its module and everything of ours that it imports, found without running it.

What counts as an import: import statements anywhere (function-local and relative ones too), and text that is exactly a
module's name, alone or as ``module:function`` (that is how jobs and lazy registries name code). A package whose
``__init__`` imports by a computed name depends on all of its modules. Packages that are merely passed through on the
way to a module count with what their ``__init__`` imports when it runs, not with what its functions might import.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from exporter.errors import InternalError
from pipelines.digests import json_digest

ROOTS = ("exporter", "calibration", "pipelines")
_MODULE_TEXT = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?::[A-Za-z_]\w*)?")


@dataclass(frozen=True)
class _Imports:
    """Modules that a file imports by name, and whether it also imports by computed names."""

    names: frozenset[str]
    computed: bool


@dataclass(frozen=True)
class _Source:
    digest: str
    running: _Imports
    """What importing the file imports."""
    anywhere: _Imports
    """That, and what its functions import and name."""


def code_digest(*code: Callable[..., Any] | str) -> str:
    """SHA-256 over the source files behind `code`: functions, module names or ``module:function`` names.

    Raises:
        InternalError: A name that is no module with a source file.
    """
    return json_digest({name: _source(path, name).digest for name, path in code_modules(*code).items()})


def code_modules(*code: Callable[..., Any] | str) -> dict[str, Path]:
    """The modules that `code` reaches, by name, with their source files; its own first, then those of `ROOTS`."""
    pending: list[tuple[str, bool]] = []
    for item in code:
        name = (item if isinstance(item, str) else item.__module__).partition(":")[0]
        if _find(name) is None:
            raise InternalError("a stage's code has no source file", name, "Name a module of Planish")
        pending.append((name, True))
    seen: set[tuple[str, bool]] = set()
    found: dict[str, Path] = {}
    while pending:
        name, explicit = pending.pop()
        path = _find(name)
        if (name, explicit) in seen or path is None:
            continue
        seen.add((name, explicit))
        found[name] = path
        pending.extend((package, False) for package in _packages_above(name))
        source = _source(path, name)
        imports = source.anywhere if explicit else source.running
        pending.extend((imported, True) for imported in sorted(imports.names))
        if imports.computed and path.name == "__init__.py":
            pending.extend((f"{name}.{below}", True) for below in _modules_in(path.parent))
    return dict(sorted(found.items()))


def _packages_above(name: str) -> Iterator[str]:
    parts = name.split(".")
    for length in range(1, len(parts)):
        yield ".".join(parts[:length])


def _modules_in(folder: Path) -> Iterator[str]:
    for path in sorted(folder.iterdir()):
        if path.suffix == ".py" and path.stem != "__init__":
            yield path.stem
        elif (path / "__init__.py").is_file():
            yield path.name


@cache
def _root(name: str) -> Path | None:
    """Folder of a top-level package of ours, or the file of any other loaded or loadable top-level module."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


def _find(name: str) -> Path | None:
    """The source file of a module, found without importing it (importing could cost seconds and run anything)."""
    top, *below = name.split(".")
    if top not in ROOTS:
        file = getattr(sys.modules.get(name), "__file__", None)  # a stage of somebody else's, already imported
        return Path(file) if file else None
    root = _root(top)
    if root is None:
        return None
    folder = root.parent.joinpath(*below)
    for path in (folder / "__init__.py", folder.with_suffix(".py") if below else root):
        if path.is_file():
            return path
    return None


def _source(path: Path, name: str) -> _Source:
    state = path.stat()
    return _parsed(path, name, state.st_mtime_ns, state.st_size)


@cache
def _parsed(path: Path, name: str, mtime_ns: int, size: int) -> _Source:
    """Parsed once as long as the file stays as it is (a job started later would run what is there then)."""
    content = path.read_bytes()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(content, filename=str(path))
    return _Source(
        hashlib.sha256(content).hexdigest(),
        running=_imports(_running(tree), package, texts=False),
        anywhere=_imports(ast.walk(tree), package, texts=True),
    )


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the file is imported: not the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not _for_types_only(child):
            yield child
            yield from _running(child)


def _for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _imports(nodes: Iterator[ast.AST], package: str, *, texts: bool) -> _Imports:
    names: set[str] = set()
    computed = False
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node.module, node.level, package)
            if node.names[0].name == "*" or any(_find_ours(f"{base}.{alias.name}") is None for alias in node.names):
                names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _imports_by_name(node.func):
            text = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            if isinstance(text, str):
                level = len(text) - len(text.lstrip("."))
                names.add(_absolute(text.lstrip(".") or None, level, package))
            else:
                computed = True
        elif texts and isinstance(node, ast.Constant) and (name := _named(node.value)):
            names.add(name)
    return _Imports(frozenset(name for name in names if _find_ours(name) is not None), computed)


def _named(value: Any) -> str | None:
    """The module in a text such as ``"calibration.datasets"`` or ``"pipelines.stages:export"``."""
    match = _MODULE_TEXT.fullmatch(value) if isinstance(value, str) and "." in value else None
    return match[1] if match else None


def _find_ours(name: str) -> Path | None:
    return _find(name) if name.partition(".")[0] in ROOTS else None


def _imports_by_name(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in ("import_module", "__import__", "iter_modules", "walk_packages")


def _absolute(module: str | None, level: int, package: str) -> str:
    """The full name behind ``from ..module import``; `level` counts the dots, `package` is where it is written."""
    if level == 0:
        return module or ""
    parts = package.split(".")
    base = parts[: len(parts) - level + 1]
    return ".".join([*base, module] if module else base)
