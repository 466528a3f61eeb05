"""What identifies the model that a factory makes: the code that it runs, and everything that its modules hold."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from exporter.digests import file_digest
from exporter.sources.source import digest_parts


def factory_digest(spec: str, model: Any, example: Mapping[str, Any]) -> str:
    """Digest of a factory's name, of the code behind it and behind its modules, of what these hold, and of its inputs.

    What the model computes is left out: its last bits depend on the processor and on the number of threads.
    """
    inputs = "\n".join(f"{name} {value.dtype} {tuple(value.shape)}" for name, value in example.items())
    return digest_parts(
        [
            ("factory", spec),
            *((f"code of {name}", file_digest(path)) for name, path in sorted(code_files(spec, model).items())),
            ("state", digest_state(model)),
            ("inputs", hashlib.sha256(inputs.encode()).hexdigest()),
        ]
    )


def code_files(spec: str, model: Any) -> dict[str, Path]:
    """The source files behind a factory and the modules that it made, by module name.

    From the factory's own file and from those of the modules' classes, the walk follows import statements, those inside
    functions too. It reads them, for what has been imported already differs from process to process. Installed packages
    other than the factory's own are left out: a run records their versions.
    """
    own = spec.partition(":")[0]
    pending = [own, *(base.__module__ for module in model.modules() for base in type(module).__mro__)]
    found: dict[str, Path] = {}
    seen: set[str] = set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        path = _source_file(name)
        if path is None or (name.partition(".")[0] != own.partition(".")[0] and _is_installed(path)):
            continue
        found[name] = path
        pending.append(name.rpartition(".")[0])
        pending.extend(_imports(path, name, file_digest(path)))
    return found


def _source_file(name: str) -> Path | None:
    """The Python file of a module, found without importing anything."""
    path = Path(getattr(sys.modules.get(name), "__file__", None) or "")
    if path.suffix == ".py" and path.is_file():
        return path
    first, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(first) if first else None
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not rest:
        candidates = [Path(spec.origin or "")]
    else:
        below = [Path(location).joinpath(*rest) for location in spec.submodule_search_locations or ()]
        candidates = [place for base in below for place in (base / "__init__.py", base.parent / f"{base.name}.py")]
    return next((place for place in candidates if place.suffix == ".py" and place.is_file()), None)


@cache
def _imports(path: Path, name: str, digest: str) -> tuple[str, ...]:
    """What the file of module `name`, with this digest, may import: modules, and names that may be modules."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ()
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return tuple(names)


def digest_state(model: Any) -> str:
    """SHA-256 over what the modules hold: parameters, buffers (those not saved too), and plain attributes.

    Of the attributes tensors count, and numbers, words and functions, also inside lists, tuples and dicts; a text with
    a path in it says where something lies and not what the model computes.
    """
    digest = hashlib.sha256()
    usual = _usual_attributes()
    for path, module in sorted(model.named_modules()):
        held = {name: value for name, value in vars(module).items() if name not in usual}
        for name, value in sorted({**module._parameters, **module._buffers, **held}.items()):
            for part in _described(value, depth=4):
                digest.update(f"{path}.{name}\0".encode())
                digest.update(part)
    return digest.hexdigest()


def _described(value: Any, *, depth: int) -> Iterator[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        yield f"{value.dtype}\0{tuple(value.shape)}\n".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    elif value is None or isinstance(value, bool | int | float | complex | torch.dtype):
        yield f"{value!r}\n".encode()
    elif isinstance(value, str):
        if os.sep not in value:
            yield f"{value!r}\n".encode()
    elif isinstance(value, list | tuple | dict) and depth:
        items = sorted(value.items(), key=lambda item: str(item[0])) if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield f"{key}\0".encode()
            yield from _described(item, depth=depth - 1)
    elif callable(value) and hasattr(value, "__qualname__"):
        yield f"{value.__module__}.{value.__qualname__}\n".encode()


@cache
def _usual_attributes() -> frozenset[str]:
    import torch

    return frozenset(vars(torch.nn.Module()))


def _is_installed(path: Path) -> bool:
    resolved = path.resolve()
    if {"site-packages", "dist-packages"} & set(resolved.parts):
        return True
    return any(resolved.is_relative_to(Path(sysconfig.get_path(kind)).resolve()) for kind in ("stdlib", "platstdlib"))
