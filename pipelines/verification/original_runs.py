"""Runs of the original in another precision than its own: in FP64, and in PyTorch's own half precision.

The FP64 run is piecewise: a module's own parameters and buffers are widened when it is called and put back when it
returns, so that beside the weights only one layer's worth of FP64 weights exists at a time. Parameters that are read
without a call of their owner (an attention that uses its projection's weight directly) are widened operator by
operator. The run is a true FP64 run only if nothing in between is rounded to FP32: a model that does so (``.float()``
around its softmax or its rotary angles) is found out by watching the operators, and has no floor of this kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.errors import RequestError
from pipelines.verification.envelope import Case

if TYPE_CHECKING:
    from torch import Tensor, nn

Array = np.ndarray
Outputs = dict[str, dict[str, Array]]

WHOLE_BELOW_BYTES = 256 * 2**20
"""Weights up to this size are widened all at once, which is faster than piece by piece."""

# Operators that make constants: their result does not depend on the values that they are given.
_CONSTANTS = ("empty", "zeros", "ones", "full", "new_", "arange", "scalar_tensor")
# Operators that round: computed in FP32 from no FP64 input, they may bring an FP32 result into an FP64 run. (Masks are
# made in FP32 by additions and products of small integers, which are exact.)
_ROUNDING = frozenset(
    (
        *("mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "convolution", "einsum", "softmax", "log_softmax"),
        *("native_layer_norm", "native_group_norm", "gelu", "silu", "exp", "log", "sin", "cos", "tanh", "sigmoid"),
        *("pow", "sqrt", "rsqrt", "erf", "mean", "reciprocal"),
    )
)


@dataclass(frozen=True)
class Run:
    """Outputs by case, or ``None`` with the reason why there are none."""

    outputs: Outputs | None
    reason: str = ""


# What a model's own code may raise when it meets a precision that it was not written for.
_MODEL_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


class _Pinned(Exception):
    """An operator left FP64: raised through the model to end the run, and caught by it."""


def fp64_outputs(module: nn.Module, cases: Sequence[Case], *, whole_below_bytes: int = WHOLE_BELOW_BYTES) -> Run:
    """Run the original in FP64 on the CPU. It is bit-identical afterwards.

    Args:
        module: FP32, on the CPU; its forward takes the cases' inputs by name and returns a flat mapping, a tuple or a
            tensor.
        cases: The inputs; floating ones are widened, which is exact.
        whole_below_bytes: See `WHOLE_BELOW_BYTES`.

    Returns:
        Outputs in float64, or the reason why there is no true FP64 run: the model pins a lower precision, or an
        operator of it does not exist in FP64.
    """
    return _collect(fp64_run(module, whole_below_bytes), cases)


def half_outputs(module: nn.Module, cases: Sequence[Case], precision: str) -> Run:
    """Run the original in PyTorch's own half precision on the CPU. It is bit-identical afterwards.

    All parameters, buffers and floating inputs are rounded to the precision, as ``module.half()`` does.

    Args:
        module: See `fp64_outputs`.
        cases: The inputs.
        precision: ``fp16`` or ``bf16``.

    Returns:
        Outputs in float32, or the reason why PyTorch cannot run this model so.
    """
    return _collect(half_run(module, precision), cases)


def _collect(way: PrecisionRun, cases: Sequence[Case]) -> Run:
    collected: Outputs = {}
    for case, outputs, reason in way.run(cases):
        if outputs is None:
            return Run(None, reason)
        collected[case.name] = outputs
    return Run(collected)


@dataclass(frozen=True)
class PrecisionRun:
    """A way of running the original.

    Attributes:
        module: The original.
        dtype: Torch's dtype that weights and floating inputs get.
        truer: It is nearer to the truth than the original's FP32 outputs.
        note: What the difference to the original's FP32 outputs is.
        enter: Puts the weights into `dtype`, for as long as the stack is open.
    """

    module: nn.Module
    dtype: Any
    truer: bool
    note: str
    enter: Callable[[ExitStack], None]

    def run(self, cases: Sequence[Case]) -> Iterator[tuple[Case, dict[str, Array] | None, str]]:
        """Case, outputs, reason; ends after the first case without outputs."""
        for case in cases:
            outputs, reason = self._run_one(case)
            yield case, outputs, reason
            if outputs is None:
                return

    def _run_one(self, case: Case) -> tuple[dict[str, Array] | None, str]:
        import torch

        with ExitStack() as stack:
            stack.enter_context(_untouched(self.module))
            stack.enter_context(torch.no_grad())
            self.enter(stack)
            try:
                outputs = _call(self.module, case, self.dtype)
            except _Pinned as error:
                return None, str(error)
            except _MODEL_ERRORS as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                return None, f"it does not run in {_short(self.dtype)}: {lines[0]}"
        if self.truer and (low := [name for name, value in outputs.items() if value.dtype == np.float32]):
            return None, f"the model computes {low[0]} in float32"
        return outputs, ""


def fp64_run(module: nn.Module, whole_below_bytes: int = WHOLE_BELOW_BYTES) -> PrecisionRun:
    """The FP64 run, see `fp64_outputs`."""
    import torch

    weights = sum(p.nbytes for p in module.parameters())

    def enter(stack: ExitStack) -> None:
        if weights <= whole_below_bytes:
            _cast_all(module, torch.float64)
        watcher = _watcher(module)
        if weights > whole_below_bytes:
            _widen_on_call(module, stack, watcher)
        stack.enter_context(watcher)

    return PrecisionRun(module, torch.float64, True, "the original's own error against its FP64 run", enter)


def half_run(module: nn.Module, precision: str) -> PrecisionRun:
    """The half-precision run, see `half_outputs`."""
    import torch

    known = {"fp16": torch.float16, "bf16": torch.bfloat16}
    if precision not in known:
        raise RequestError("not a half precision", precision, "Use fp16 or bf16")
    note = f"the error of PyTorch's own {precision} run"
    return PrecisionRun(module, known[precision], False, note, lambda _: _cast_all(module, known[precision]))


@contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """Put the very same tensors, storages and modes back at the end, whatever happened in between."""
    owners = list(module.modules())
    tensors = [(t, t.data) for owner in owners for t in _own_tensors(owner)]
    tables = [(owner, dict(owner._parameters), dict(owner._buffers), owner.training) for owner in owners]
    try:
        module.eval()
        yield
    finally:
        for tensor, data in tensors:
            tensor.data = data
        for owner, parameters, buffers, training in tables:
            owner._parameters.update(parameters)
            owner._buffers.update(buffers)
            owner.training = training


def _own_tensors(owner: nn.Module) -> list[Tensor]:
    """Floating parameters and buffers that this module itself owns."""
    owned = [*owner._parameters.values(), *owner._buffers.values()]
    return [tensor for tensor in owned if tensor is not None and tensor.is_floating_point()]


def _cast_all(module: nn.Module, dtype: Any) -> None:
    import torch

    done: set[int] = set()
    for owner in module.modules():
        for tensor in _own_tensors(owner):
            if id(tensor) not in done and tensor.dtype == torch.float32:
                tensor.data = tensor.data.to(dtype)
                done.add(id(tensor))


def _widen_on_call(module: nn.Module, stack: ExitStack, watcher: Any) -> None:
    """Hooks: a module's own tensors are FP64 while it runs, and look so all the time. The watcher looks away meanwhile.

    Between calls a stand-in has their place: as large, FP64, and never written to, so that the system gives it no
    memory. A model that asks for the type of a weight which it does not call itself (to bring an image to it, say) is
    told the type that the weight will have. Whoever reads the stand-in gets the widened values, by the watcher.
    """
    import torch

    originals: dict[int, Tensor] = {}
    stand_ins: dict[int, Tensor] = {}
    held: dict[int, list[list[Tensor]]] = {}
    for owner in module.modules():
        for tensor in _own_tensors(owner):
            if tensor.dtype == torch.float32 and tensor.numel():
                originals[id(tensor)] = tensor.data
                stand_ins[id(tensor)] = tensor.data = torch.empty_like(tensor.data, dtype=torch.float64)
    watcher.stands_for.update((stand_ins[key].untyped_storage().data_ptr(), data) for key, data in originals.items())

    def waiting(tensor: Tensor) -> bool:
        return id(tensor) in stand_ins and tensor.data_ptr() == stand_ins[id(tensor)].data_ptr()

    def widen(owner: nn.Module, _args: Any) -> None:
        watcher.away = True
        kept = [tensor for tensor in _own_tensors(owner) if waiting(tensor)]
        for tensor in kept:
            tensor.data = originals[id(tensor)].double()
        watcher.away = False
        held.setdefault(id(owner), []).append(kept)

    def restore(owner: nn.Module, _args: Any, _output: Any) -> None:
        watcher.away = True
        for tensor in held[id(owner)].pop():
            tensor.data = stand_ins[id(tensor)]
        watcher.away = False

    for owner in module.modules():
        if _own_tensors(owner):
            # First in, last out: hooks of the model itself see widened tensors.
            handle = owner.register_forward_pre_hook(widen, prepend=True)
            stack.callback(handle.remove)
            handle = owner.register_forward_hook(restore)
            stack.callback(handle.remove)


def _watcher(module: nn.Module) -> Any:
    """A dispatch mode that widens parameters read directly, and raises `_Pinned` where an operator leaves FP64.

    What was rounded in FP32 without ever being FP64 (rotary angles, say) is followed, and found out only where it
    meets FP64 values: relative positions, for one, are computed with an FP32 logarithm and become integers. Scalars are
    not followed: they are constants, the same in every run.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map_only
    from torch.utils.weak import WeakTensorKeyDictionary

    narrow = (torch.float32, torch.float16, torch.bfloat16)
    rounded = WeakTensorKeyDictionary()
    weights = {t.untyped_storage().data_ptr() for owner in module.modules() for t in _own_tensors(owner)}

    def widen(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.float32 and tensor.untyped_storage().data_ptr() in weights:
            return tensor.double()
        if stands_for and (meant := stands_for.get(tensor.untyped_storage().data_ptr())) is not None:
            return meant.double()
        return tensor

    def tensors(tree: Any) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]

    stands_for: dict[int, Tensor] = {}

    class Watcher(TorchDispatchMode):
        away = False

        def __init__(self) -> None:
            super().__init__()
            self.stands_for = stands_for  # what a stand-in's storage stands for

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if self.away:
                return func(*args, **(kwargs or {}))
            args, kwargs = tree_map_only(torch.Tensor, widen, (args, kwargs or {}))
            result = func(*args, **kwargs)
            name = func.overloadpacket.__name__
            taken, given = tensors((args, kwargs)), tensors(result)
            carried = [rounded[tensor] for tensor in taken if tensor in rounded]
            if carried and any(tensor.dtype == torch.float64 for tensor in given):
                raise _Pinned(f"the model computes in float32 inside ({carried[0]})")
            left = [tensor for tensor in given if tensor.dtype in narrow]
            if not left or name.startswith(_CONSTANTS):
                return result
            if any(tensor.dtype == torch.float64 for tensor in taken):
                raise _Pinned(f"the model rounds to {_short(left[0].dtype)} inside ({name})")
            if carried or name.strip("_") in _ROUNDING or "scaled_dot" in name:
                for tensor in left:
                    if tensor.dim() > 0:
                        rounded[tensor] = carried[0] if carried else name
            return result

    return Watcher()


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _call(module: nn.Module, case: Case, dtype: Any) -> dict[str, Array]:
    """The module's outputs as host arrays: FP64 stays, lower precisions come back as FP32."""
    import torch

    inputs = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in case.inputs.items()}
    inputs = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    result = module(**inputs)
    if isinstance(result, torch.Tensor):
        result = {"output": result}
    elif not isinstance(result, Mapping):
        result = {f"output_{i}": value for i, value in enumerate(result)}
    outputs = {}
    for name, value in result.items():
        if isinstance(value, torch.Tensor):
            value = value.detach()
            outputs[name] = (value.float() if value.dtype in (torch.float16, torch.bfloat16) else value).numpy()
    return outputs
