"""SmoothQuant on a `torch.export` program, for AOTInductor: as `calibration.smooth` does it on ONNX graphs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.factors import (
    WORTH_AN_OPERATOR,
    Operands,
    by_what_they_share,
    choose_factors,
    group_record,
    no_gain,
    smoothing_record,
)
from calibration.quantize.products import Kept
from exporter.errors import InternalError, RequestError
from exporter.passes.base import FUSED_RMS

if TYPE_CHECKING:
    import torch
    from torch import fx

Array = np.ndarray
CHECKED_BATCHES = 4
_NAME = "smooth_constant_"


def smooth_program(
    module: fx.GraphModule, samples: Iterable[Mapping[str, torch.Tensor]], alpha: float | None = None
) -> dict[str, Any]:
    """Smooth the linear layers of an exported module, in place, and prove on samples that it computes the same.

    Args:
        module: What `ExportedProgram.module` gives: FP32, with `aten.linear` nodes.
        samples: Calibration batches by input name, gone through once.
        alpha: See `calibration.factors.choose_factors`.

    Returns:
        The record that `calibration.smooth.smooth_file` gives. Without ``groups`` nothing was smoothed.

    Raises:
        RequestError: There are no samples, or an activation is NaN or infinite.
        InternalError: The outputs differ by more than rounding.
    """
    import torch

    linears = [
        node for node in module.graph.nodes if _is(node, "linear") and _constant(module, node.args[1]) is not None
    ]
    seen = {node.args[0]: _Seen() for node in linears}
    checked: list[tuple[Mapping[str, torch.Tensor], dict[str, torch.Tensor]]] = []
    with torch.no_grad():
        observer = _observer(module, seen)
        for number, batch in enumerate(samples):
            found = observer.run(*_in_order(module, batch))
            for node, what in seen.items():
                if not np.isfinite(what.high).all() or not np.isfinite(what.low).all():
                    raise RequestError(
                        "an activation is NaN or infinite",
                        f"{node.name!r}, calibration batch {number}",
                        "Leave its samples out, or mend the model: no range can be learned from it",
                    )
            if number < CHECKED_BATCHES:
                checked.append((batch, found))
        if not checked:
            raise RequestError("there are no calibration samples", None, "Give data with at least one row")
        record = _smooth(module, linears, seen, alpha)
        if not record["groups"]:
            return record
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.recompile()
        return {**record, "rms_relative": _difference(module, checked)}


@dataclass
class _Seen:
    """What was seen of one tensor, per channel: (channels,) each."""

    low: Array = field(default_factory=lambda: np.zeros(0))
    high: Array = field(default_factory=lambda: np.zeros(0))
    square: Array = field(default_factory=lambda: np.zeros(0))
    count: int = 0

    def add(self, value: torch.Tensor) -> None:
        rows = value.reshape(-1, value.shape[-1])
        if not len(rows):
            return
        low, high = rows.amin(0).numpy(), rows.amax(0).numpy()
        square = rows.double().square().sum(0).numpy()
        first = self.count == 0
        self.low = low if first else np.minimum(self.low, low)
        self.high = high if first else np.maximum(self.high, high)
        self.square = square if first else self.square + square
        self.count += len(rows)


def _observer(module: fx.GraphModule, seen: Mapping[fx.Node, _Seen]) -> fx.Interpreter:
    from torch import fx

    class Observer(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            value = super().run_node(node)
            if node in seen:
                seen[node].add(value)
            return value

    return Observer(module)


def _smooth(
    module: fx.GraphModule, linears: list[fx.Node], seen: Mapping[fx.Node, _Seen], alpha: float | None
) -> dict[str, Any]:
    groups: list[dict[str, Any]] = []
    kept: list[Kept] = []
    usable = []
    for node in linears:
        what = seen[node.args[0]]
        if not what.count or (what.low == what.high).all():
            reason = f"its input {node.args[0].name!r} never changed in calibration"
            kept.append(Kept(node.name, "linear", "constant_input", reason))
        else:
            usable.append(node)
    parts = by_what_they_share(usable, lambda node: (node.args[0], id(_constant(module, node.args[1]))))
    plans = [(part, *_plan(module, part, seen, alpha)) for part in parts]
    for part, chosen, factors, error in plans:
        values = dict.fromkeys(node.args[0] for node in part)
        readers = {value: [node for node in part if node.args[0] is value] for value in values}
        made = {value: _makers(module, value, nodes) for value, nodes in readers.items()}
        if error >= (WORTH_AN_OPERATOR if any(why for _, why in made.values()) else 1.0):
            kept += [no_gain(node.name, "linear", chosen, error) for node in part]
            continue
        entries = [_divide(module, value, readers[value], *made[value], factors) for value in values]
        written: dict[int, fx.Node] = {}
        for node in part:
            key = id(_constant(module, node.args[1]))
            if key not in written:
                written[key] = _scaled(module, node, node.args[1], factors)
            node.update_arg(1, written[key])
        groups.append(group_record([node.name for node in part], entries, chosen, factors, error))
    return smoothing_record(alpha, groups, kept)


def _plan(
    module: fx.GraphModule, part: list[fx.Node], seen: Mapping[fx.Node, _Seen], alpha: float | None
) -> tuple[float, Array, float]:
    operands = []
    for value in dict.fromkeys(node.args[0] for node in part):
        what = seen[value]
        tensors = [_constant(module, node.args[1]) for node in part if node.args[0] is value]
        weights = [tensor.detach().numpy().T for tensor in tensors if tensor is not None]
        operands.append(Operands(what.low, what.high, what.square / what.count, weights))
    return choose_factors(operands, alpha)


def _makers(module: fx.GraphModule, value: fx.Node, readers: list[fx.Node]) -> tuple[list[tuple[fx.Node, int]], str]:
    """The constants that divide `value` when they are divided: node and place of each; or why there are none."""
    for user in value.users:
        if user not in readers or value in user.args[1:]:
            return [], f"{user.name!r} reads {value.name!r} too"
    if _is(value, "relu") or (_is(value, "dropout") and not value.args[2]):
        return _makers(module, value.args[0], [value])
    first = {"layer_norm": 2, "linear": 1}.get(_name(value))
    if first is not None and len(value.args) > first and value.args[first] is not None:
        given = [place for place in (first, first + 1) if len(value.args) > place and value.args[place] is not None]
        if all(_constant(module, value.args[place]) is not None for place in given):
            return [(value, place) for place in given], ""
    if _is(value, "mul"):
        constant = [place for place in (0, 1) if _constant(module, value.args[place]) is not None]
        if constant:
            return [(value, constant[0])], ""
    return [], f"no constants of {value.name!r} ({_name(value) or value.op}) make it"


def _divide(
    module: fx.GraphModule,
    value: fx.Node,
    readers: list[fx.Node],
    places: list[tuple[fx.Node, int]],
    why: str,
    factors: Array,
) -> dict[str, Any]:
    import torch

    if not why:
        for node, place in places:
            rows = _is(node, "linear") and place == 1
            inverse = 1 / factors.astype(np.float64)
            node.update_arg(place, _scaled(module, node, node.args[place], inverse[:, None] if rows else inverse))
        names = [node.name for node, _ in places]
        return {"activation": value.name, "how": "folded", "into": list(dict.fromkeys(names))}
    divisor = _added(module, readers[0], torch.from_numpy(factors.copy()))
    with module.graph.inserting_before(readers[0]):
        # torchao rounds both inputs of a product of two tensors: it must not see one here.
        divided = module.graph.call_function(torch.ops.aten.div.Tensor, (value, divisor))
    divided.meta["val"] = value.meta.get("val")
    for node in readers:
        node.update_arg(0, divided)
    return {"activation": value.name, "how": "inserted", "why": why}


def _scaled(module: fx.GraphModule, reader: fx.Node, old: fx.Node, factors: Array) -> fx.Node:
    """A constant times factors, in place of the constant that `reader` reads."""
    import torch

    tensor = _constant(module, old)
    assert tensor is not None
    array = (tensor.detach().numpy() * factors).astype(np.float32)
    return _added(module, reader, torch.from_numpy(array), old)


def _added(module: fx.GraphModule, reader: fx.Node, tensor: torch.Tensor, like: fx.Node | None = None) -> fx.Node:
    number = 0
    while hasattr(module, f"{_NAME}{number}"):
        number += 1
    module.register_buffer(f"{_NAME}{number}", tensor)
    with module.graph.inserting_before(reader):
        node = module.graph.get_attr(f"{_NAME}{number}")
    node.meta.update({} if like is None else like.meta)
    return node


def _constant(module: fx.GraphModule, node: Any) -> torch.Tensor | None:
    """The FP32 tensor that a node stands for, if it is a constant."""
    import torch

    if getattr(node, "op", None) != "get_attr":
        return None
    found: Any = module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found if isinstance(found, torch.Tensor) and found.dtype == torch.float32 else None


def _is(node: fx.Node, name: str) -> bool:
    return _name(node) == name


def _name(node: fx.Node) -> str:
    """Of an operator of ATen, without its overload; else empty."""
    target = str(node.target)
    return target.split(".")[1] if node.op == "call_function" and target.startswith("aten.") else ""


def _in_order(module: fx.GraphModule, batch: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    return [batch[str(node.target)] for node in module.graph.nodes if node.op == "placeholder"]


def _difference(module: fx.GraphModule, checked: list[tuple[Mapping[str, torch.Tensor], Any]]) -> float:
    from torch.utils import _pytree as pytree

    worst = 0.0
    for batch, before in checked:
        after = module(**batch)
        for a, b in zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True):
            size = float(a.double().norm())
            worst = max(worst, float((a.double() - b.double()).norm()) / size if size else 0.0)
    if worst > FUSED_RMS:
        raise InternalError("smoothing changed what the program computes", worst, "Report this as a bug")
    return worst
