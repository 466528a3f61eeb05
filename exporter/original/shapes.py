"""Signatures by observation: example inputs at chosen lengths, and which output dimension follows which axis."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from exporter.artifact import Axis, Signature, TensorSpec
from exporter.errors import RequestError

_FIXED_SIZES = "A model that needs fixed sizes can be wrapped in a factory, its axes declared under custom"

Call = Callable[[dict[str, Any]], Mapping[str, Any]]


def sign_forward(module: Any, function: Callable[..., Any], inputs: tuple[str, ...]) -> None:
    """Give `module` a class whose ``forward`` is `function` and declares exactly `inputs`.

    Tracers read the declared parameters to match dynamic shapes with inputs. A subclass rather than a function on the
    instance: a copy of the module (in another precision, say) then runs its own weights and not those of the module
    that it was copied from.
    """

    def forward(self: Any, *args: Any, **given: Any) -> Any:
        return function(self, **dict(zip(inputs, args, strict=False)), **given)

    base = type(module)
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *inputs)]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    namespace = {"forward": forward, "__module__": base.__module__, "__qualname__": base.__qualname__}
    module.__class__ = type(base.__name__, (base,), namespace)


def dtype_name(tensor: Any) -> str:
    """NumPy's name of a torch tensor's element type."""
    return str(tensor.dtype).removeprefix("torch.")


def axis_lengths(specs: tuple[TensorSpec, ...], example: Mapping[str, Any]) -> dict[str, int]:
    """The length that every dynamic axis has in the example.

    Raises:
        RequestError: An example does not fit its declared shape, or an axis has two lengths.
    """
    lengths: dict[str, tuple[int, str]] = {}
    for spec in specs:
        shape = tuple(example[spec.name].shape)
        if len(shape) != len(spec.shape):
            raise RequestError(
                f"the example of input {spec.name!r} does not fit its shape", shape, f"It is {spec.shape}"
            )
        for actual, wanted in zip(shape, spec.shape, strict=True):
            if isinstance(wanted, int) and actual != wanted:
                raise RequestError(
                    f"the example of input {spec.name!r} does not fit its shape", shape, f"It is {spec.shape}"
                )
            if isinstance(wanted, str) and (seen := lengths.setdefault(wanted, (actual, spec.name)))[0] != actual:
                raise RequestError(
                    f"axis {wanted!r} has two lengths in the examples",
                    f"{seen[0]} in {seen[1]!r}, {actual} in {spec.name!r}",
                    "Give examples that agree, or declare the axes under custom",
                )
    return {name: length for name, (length, _) in lengths.items()}


def resize(specs: tuple[TensorSpec, ...], example: Mapping[str, Any], lengths: Mapping[str, int]) -> dict[str, Any]:
    """The example with its dynamic axes brought to `lengths` by repeating or cutting what is there."""
    import torch

    resized = {}
    for spec in specs:
        tensor = example[spec.name]
        for dim, axis in enumerate(spec.shape):
            if isinstance(axis, str) and axis in lengths:
                tensor = tensor.index_select(dim, torch.arange(lengths[axis]) % tensor.shape[dim])
        resized[spec.name] = tensor
    return resized


def widen(specs: tuple[TensorSpec, ...], axes: tuple[Axis, ...], example: Mapping[str, Any]) -> dict[str, Any]:
    """The example with every dynamic axis at least 2 long, where it may be: tracers take a length of 1 for fixed."""
    lengths = axis_lengths(specs, example)
    for axis in axes:
        if axis.name in lengths:
            lengths[axis.name] = min(max(lengths[axis.name], 2, axis.min), axis.max)
    return resize(specs, example, lengths)


def observe_outputs(
    call: Call, specs: tuple[TensorSpec, ...], axes: tuple[Axis, ...], example: Mapping[str, Any]
) -> tuple[TensorSpec, ...]:
    """The outputs' names, types and shapes, found by running the model once and twice more per dynamic axis.

    A dimension as long as an axis at all of its lengths carries that axis' name; one that follows in another way
    (half the length, the product of two axes) is named ``<output>_<dimension>``.

    Raises:
        RequestError: The model does not run on its example, or not at another length of a dynamic axis.
    """
    lengths = axis_lengths(specs, example)
    base = _run(call, dict(example), "the model does not run on its example inputs", None)
    outputs = tuple(TensorSpec(n, dtype_name(v), tuple(int(d) for d in v.shape)) for n, v in base.items())
    shapes = {spec.name: list(spec.shape) for spec in outputs}
    for axis in axes:
        if axis.name not in lengths or axis.min == axis.max:
            continue
        old = lengths[axis.name]
        what = f"the model does not run when axis {axis.name!r} has another length"
        seen = {old: base}
        for new in _other_lengths(axis, old):
            inputs = resize(specs, example, {**lengths, axis.name: new})
            seen[new] = _run(call, inputs, what, f"{new} instead of {old}")
        for spec in outputs:
            for new, found in seen.items():
                if found[spec.name].dim() != len(spec.shape):
                    told = f"output {spec.name!r} changes its number of dimensions with axis {axis.name!r}"
                    raise RequestError(told, new)
            for index in range(len(spec.shape)):
                dims = {new: int(found[spec.name].shape[index]) for new, found in seen.items()}
                if len(set(dims.values())) > 1:
                    follows = all(new == dim for new, dim in dims.items()) and isinstance(shapes[spec.name][index], int)
                    shapes[spec.name][index] = axis.name if follows else f"{spec.name}_{index}"
    return tuple(replace(spec, shape=tuple(shapes[spec.name])) for spec in outputs)


def _other_lengths(axis: Axis, length: int) -> list[int]:
    """A neighbour and a length further away: a pooled output keeps its length from one to the next."""
    neighbour = length + 1 if length < axis.max else length - 1
    end = axis.max if axis.max - length >= length - axis.min else axis.min
    return list(dict.fromkeys([neighbour, 2 * length if axis.min <= 2 * length <= axis.max else end]))


def signature_of(
    call: Call, specs: tuple[TensorSpec, ...], axes: tuple[Axis, ...], example: Mapping[str, Any]
) -> Signature:
    """The whole signature of `call`."""
    return Signature(specs, observe_outputs(call, specs, axes, example), axes)


def _run(call: Call, inputs: dict[str, Any], what: str, value: str | None) -> Mapping[str, Any]:
    import torch

    try:
        with torch.inference_mode():
            return call(inputs)
    except RequestError:
        raise
    except Exception as error:  # the model is the user's: it may raise anything
        lines = str(error).strip().splitlines()
        told = f"{type(error).__name__}: {lines[0] if lines else '(no message)'}"
        raise RequestError(what, told if value is None else f"{value}; {told}", _FIXED_SIZES) from error
