"""``module:factory`` sources: a callable that returns an ``nn.Module`` and its example inputs."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import Any

from exporter.errors import RequestError
from exporter.sources.factory_digest import factory_digest
from exporter.sources.source import Source, bundle_name

SHAPE = "A factory returns (nn.Module, {input name: example tensor})"


def resolve_factory(spec: str, module: str, attribute: str) -> Source:
    """Call the factory once and describe what it made; the digest covers its code and what it made.

    Raises:
        RequestError: The module or the callable is missing, or the factory raised or returned something else.
    """
    model, example = call_factory(spec)
    return Source(
        kind="factory",
        spec=spec,
        path=None,
        name=bundle_name(attribute.split(".")[-1].replace("_", "-")),
        digest=factory_digest(spec, model, example),
        weights_bytes=sum(value.numel() * value.element_size() for value in model.state_dict().values()),
        parameters=sum(value.numel() for value in model.parameters()),
    )


def call_factory(spec: str) -> tuple[Any, dict[str, Any]]:
    """The module (in evaluation mode) and the example inputs that a factory makes.

    Torch's random generator is seeded while the factory runs, so that one which initialises weights at random makes
    the same model in every process.

    Raises:
        RequestError: As `resolve_factory`.
    """
    import torch

    factory = _find(spec)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = factory()
    except (Exception, SystemExit) as error:
        raise RequestError(
            "the factory raised",
            f"{type(error).__name__}: {_last_line(error)} (in {spec})",
            "Call it on its own",
        ) from error
    if not (isinstance(made, tuple) and len(made) == 2):
        raise RequestError(f"the factory {spec} returned something else", type(made).__name__, SHAPE)
    model, example = made
    if not isinstance(model, torch.nn.Module):
        raise RequestError(f"the factory {spec} returned no nn.Module", type(model).__name__, SHAPE)
    if not isinstance(example, dict) or not example:
        raise RequestError(f"the factory {spec} returned no example inputs", type(example).__name__, SHAPE)
    for name, value in example.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise RequestError(f"the factory {spec} returned an example that is no tensor", repr(name), SHAPE)
    return model.eval(), example


def _find(spec: str) -> Any:
    module_name, _, attribute = spec.partition(":")
    # A console script does not have the working folder on the import path, where a user's own module usually lies.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise RequestError(
                "there is no such package or module", module_name, "Install it, or run where Python can import it"
            ) from error
        raise RequestError(f"the module {module_name} needs a module that is missing", error.name) from error
    except (Exception, SystemExit) as error:
        raise RequestError(
            f"the module {module_name} raised while it was imported", f"{type(error).__name__}: {_last_line(error)}"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise RequestError(
                "there is neither such a folder in the package nor such a factory in the module", spec, SHAPE
            )
        found = getattr(found, part)
    if not callable(found):
        raise RequestError("the factory is not callable", spec, SHAPE)
    return found


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else "(no message)"
