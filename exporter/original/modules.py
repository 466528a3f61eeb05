"""Any ``nn.Module`` as an original: factories and exported programs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from exporter.artifact import Axis, InputContract, TensorSpec
from exporter.errors import RequestError
from exporter.original.base import DEFAULT_MAX_LENGTH, Original
from exporter.original.shapes import axis_lengths, dtype_name, sign_forward, signature_of, widen
from exporter.sources.factory import call_factory
from exporter.sources.factory_digest import factory_digest
from exporter.sources.source import Source
from exporter.tasks.registry import Task

BATCH = "batch"
Custom = Mapping[str, Any] | None


class NamedModule(nn.Module):
    """A module that takes its inputs by name and returns its tensors in a flat ``dict``.

    Args:
        module: Called with keywords where its ``forward`` has parameters of these names, else with positions.
        inputs: Names of the inputs, in order.
        outputs: Names for the outputs, in order; ``None`` takes the names under which the module returns them.
    """

    def __init__(self, module: nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...] | None) -> None:
        super().__init__()
        self.module = module
        self.inputs = inputs
        self.outputs = outputs
        self.by_name = _takes_names(module, inputs)
        sign_forward(self, NamedModule.forward, inputs)

    def forward(self, **given: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.module(**given) if self.by_name else self.module(*(given[name] for name in self.inputs))
        return name_outputs(found, self.outputs)


def name_outputs(found: Any, names: tuple[str, ...] | None) -> dict[str, torch.Tensor]:
    """A module's result as a flat ``dict`` of tensors.

    Raises:
        RequestError: It holds no tensors, or not as many as there are names.
    """
    flat = dict(_flatten("", found))
    if not flat:
        raise RequestError("the module returns no tensors", type(found).__name__)
    if names is None:
        return flat
    if set(names) <= set(flat):
        return {name: flat[name] for name in names}
    if len(names) != len(flat):
        raise RequestError(
            "the module returns another number of tensors than declared", len(flat), f"Declared: {names}"
        )
    return dict(zip(names, flat.values(), strict=True))


def open_factory(
    source: Source,
    task: Task,
    *,
    max_batch: int,
    max_length: int | None,
    attends: bool,
    custom: Custom,
) -> Original:
    """Call the factory and wrap what it made.

    Raises:
        RequestError: The factory fails, its model is not the one that was resolved, or its example does not fit what
            is declared.
    """
    module, example = call_factory(source.spec)
    if factory_digest(source.spec, module, example) != source.digest:
        raise RequestError(
            "the factory made another model than before", source.spec, "Make it give the same model at every call"
        )
    example = {name: value.float() if value.is_floating_point() else value for name, value in example.items()}
    return _open(source, task, module.float(), example, max_batch, custom)


def open_program(
    source: Source,
    task: Task,
    *,
    max_batch: int,
    max_length: int | None,
    attends: bool,
    custom: Custom,
) -> Original:
    """Load a `torch.export` program; its own range constraints become the axes.

    Raises:
        RequestError: The file cannot be loaded, or it carries no example inputs.
    """
    try:
        program = torch.export.load(source.path)
    except Exception as error:  # archives of any content
        lines = str(error).strip().splitlines()
        raise RequestError(
            "the .pt2 file cannot be loaded as a torch.export program",
            f"{type(error).__name__}: {lines[0] if lines else '(no message)'}",
            "AOTInductor packages are engines, not sources",
        ) from error
    if program.example_inputs is None:
        raise RequestError("the program carries no example inputs", source.path, "Save it with its example inputs")
    args, kwargs = program.example_inputs
    values = [*args, *kwargs.values()]
    placeholders = _user_placeholders(program)
    names = tuple([node.name for node in placeholders[: len(args)]] + list(kwargs))
    if len(placeholders) != len(values) or not all(isinstance(value, torch.Tensor) for value in values):
        raise RequestError("the program takes inputs that are no plain tensors", source.path, "Export it with tensors")
    example = dict(zip(names, values, strict=True))
    if custom is not None:
        return _open(source, task, _ProgramModule(program, len(args), names), example, max_batch, custom)
    specs, axes = _program_inputs(program, names, placeholders, max_batch, max_length)
    return _wrap(source, task, _ProgramModule(program, len(args), names), specs, axes, example, None)


class _ProgramModule(nn.Module):
    """The program's module, taking keywords for what it takes by position."""

    def __init__(self, program: Any, positional: int, names: tuple[str, ...]) -> None:
        super().__init__()
        self.program = program.module()
        self.positional = names[:positional]
        self.keywords = names[positional:]

    def forward(self, **given: torch.Tensor) -> Any:
        by_name = {name: given[name] for name in self.keywords}
        return self.program(*(given[name] for name in self.positional), **by_name)

    def train(self, mode: bool = True) -> _ProgramModule:
        return self  # an exported program is in the mode in which it was exported


def _open(
    source: Source,
    task: Task,
    module: nn.Module,
    example: dict[str, Any],
    max_batch: int,
    custom: Custom,
) -> Original:
    if custom is None:
        specs, axes = _batched(example, max_batch)
        return _wrap(source, task, module, specs, axes, example, None)
    declared = custom["inputs"]
    if set(declared) != set(example):
        raise RequestError(
            "the declared inputs are not those of the example", ", ".join(declared), f"It has: {', '.join(example)}"
        )
    specs = tuple(TensorSpec(name, item["dtype"], tuple(item["shape"])) for name, item in declared.items())
    for spec in specs:
        if dtype_name(example[spec.name]) != spec.dtype:
            raise RequestError(
                f"input {spec.name!r} is declared with another dtype than its example",
                spec.dtype,
                f"The example is {dtype_name(example[spec.name])}",
            )
    axes = tuple(Axis(name, int(item["min"]), int(item["max"])) for name, item in custom.get("axes", {}).items())
    outputs = tuple(custom.get("outputs") or ()) or None
    return _wrap(source, task, module, specs, axes, {spec.name: example[spec.name] for spec in specs}, outputs)


def _wrap(
    source: Source,
    task: Task,
    module: nn.Module,
    specs: tuple[TensorSpec, ...],
    axes: tuple[Axis, ...],
    example: dict[str, Any],
    outputs: tuple[str, ...] | None,
) -> Original:
    named = NamedModule(module, tuple(spec.name for spec in specs), outputs).eval().requires_grad_(False)
    example = widen(specs, axes, example)
    signature = signature_of(lambda inputs: named(**inputs), specs, axes, example)
    return Original(
        source=source,
        task=task,
        module=named,
        signature=signature,
        contract=InputContract(),  # nothing is known about its inputs, so nothing is promised
        example=example,
        modality="tensor",
    )


def _batched(example: dict[str, Any], max_batch: int) -> tuple[tuple[TensorSpec, ...], tuple[Axis, ...]]:
    specs = tuple(
        TensorSpec(name, dtype_name(value), (BATCH, *map(int, value.shape[1:])) if value.dim() else ())
        for name, value in example.items()
    )
    axis_lengths(specs, example)
    axes = (Axis(BATCH, 1, max_batch),) if any(spec.shape for spec in specs) else ()
    return specs, axes


def _program_inputs(
    program: Any, names: tuple[str, ...], placeholders: list[Any], max_batch: int, max_length: int | None
) -> tuple[tuple[TensorSpec, ...], tuple[Axis, ...]]:
    """Specs from the program's symbolic shapes: a symbol first met at dimension 0 is the batch, of an integer input's
    dimension 1 the sequence, any other is named after where it was met."""
    symbols: dict[str, Axis] = {}
    specs = []
    for name, node in zip(names, placeholders, strict=True):
        value = node.meta["val"]
        shape: list[int | str] = []
        for index, dim in enumerate(value.shape):
            if isinstance(dim, int):
                shape.append(dim)
                continue
            key = str(dim)
            if key not in symbols:
                symbols[key] = _program_axis(program, dim, name, index, value, max_batch, max_length)
            shape.append(symbols[key].name)
        specs.append(TensorSpec(name, dtype_name(value), tuple(shape)))
    return tuple(specs), tuple(symbols.values())


def _program_axis(
    program: Any, dim: Any, name: str, index: int, value: Any, max_batch: int, max_length: int | None
) -> Axis:
    ranges = {str(symbol): interval for symbol, interval in program.range_constraints.items()}
    interval = ranges.get(str(dim))
    if interval is None:
        raise RequestError("an axis of the program follows from another one", f"{name} dimension {index}: {dim}")
    called = f"{name}_{index}"
    wanted = DEFAULT_MAX_LENGTH if max_length is None else max_length
    if index == 0:
        called, wanted = BATCH, max_batch
    elif index == 1 and not value.dtype.is_floating_point:
        called = "sequence"
    low = max(1, int(interval.lower))
    try:
        high = int(interval.upper)
    except (TypeError, OverflowError, ValueError):  # unbounded
        high = wanted
    return Axis(called, low, max(low, min(high, wanted)))


def _user_placeholders(program: Any) -> list[Any]:
    wanted = set(program.graph_signature.user_inputs)
    return [node for node in program.graph.nodes if node.op == "placeholder" and node.name in wanted]


def _takes_names(module: nn.Module, names: tuple[str, ...]) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return True
    by_name = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return set(names) <= by_name


def _flatten(prefix: str, value: Any) -> list[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        return [(prefix or "output_0", value)]
    if isinstance(value, Mapping):
        return [
            pair for key, item in value.items() for pair in _flatten(f"{prefix}_{key}" if prefix else str(key), item)
        ]
    if isinstance(value, list | tuple):
        return [pair for i, item in enumerate(value) for pair in _flatten(f"{prefix or 'output'}_{i}", item)]
    return []
