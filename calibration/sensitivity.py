"""Which layers cost accuracy when they are quantized, and the fewest to keep in higher precision for a gate to pass.

Measured, not guessed: every figure comes from running a form of the model. First groups of layers are quantized alone,
and the groups that do harm are divided until single layers stand for themselves. Then layers are kept in FP32 in the
order of harm per second gained, until the gate passes; and those that turn out not to be needed are let go again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from exporter.errors import RequestError

Form = TypeVar("Form")  # whatever `make` gives and the others take: an artifact, a session
NEGLIGIBLE = 0.02
"""Share of all harm below which a group is not divided any further."""
_LEAST_GAIN = 0.05  # of the mean gain of a layer: what timing cannot tell from nothing


@dataclass(frozen=True)
class Layer:
    """What can be quantized or kept as one.

    Attributes:
        name: Of its node in the graph.
        op: Its operator.
        kind: Layers of the same kind (operator, shape of the weight) gain the same time.
    """

    name: str
    op: str
    kind: Hashable = None


@dataclass(frozen=True)
class Judgement:
    """What a gate says of a form.

    Attributes:
        passed: It may ship.
        drop: How far it falls behind, in the gate's own unit; smaller is better.
        told: The gate's reason.
    """

    passed: bool
    drop: float
    told: str


@dataclass
class LayerCost:
    """What is known of one layer.

    Attributes:
        layer: Which.
        error: Error of the model's outputs with this layer alone quantized; of a layer that was only measured as one of
            `together`, its even share of that group's error.
        together: Number of layers that were quantized together for this figure: 1 where it was alone.
        gained_s: Seconds that one run gains by quantizing it; ``None`` where that was not measured.
        cost: `error` squared over the seconds gained, as a share of all layers' sum.
        kept: It stays in FP32.
    """

    layer: Layer
    error: float
    together: int
    gained_s: float | None = None
    cost: float = 0.0
    kept: bool = False


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        passed: The gate passes with `kept` in FP32.
        kept: Names of the layers in FP32; where nothing passes, those of the form that came closest.
        costs: Every layer, the costliest first; none where the gate passes with all layers quantized.
        steps: Every form that the gate has judged, in order: ``kept`` (number), ``passed``, ``drop``, ``told``.
        runs: Number of forms made and run.
    """

    passed: bool
    kept: frozenset[str]
    costs: tuple[LayerCost, ...]
    steps: tuple[dict[str, Any], ...]
    runs: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as ``evidence/precision.json`` has it."""
        return {
            "passed": self.passed,
            "kept": sorted(self.kept),
            "layers": [
                {
                    "node": cost.layer.name,
                    "op": cost.layer.op,
                    "error": cost.error,
                    "quantized_together": cost.together,
                    "gained_ms": None if cost.gained_s is None else 1e3 * cost.gained_s,
                    "cost_share": cost.cost,
                    "kept": cost.kept,
                }
                for cost in self.costs
            ],
            "steps": list(self.steps),
            "runs": self.runs,
        }


def search(
    layers: Sequence[Layer],
    make: Callable[[Collection[str]], Form],
    *,
    measure: Callable[[Form], float],
    evaluate: Callable[[Form], Judgement],
    time: Callable[[Form], float] | None = None,
    on_line: Callable[[str], None] = lambda text: None,
) -> Search:
    """Find the fewest layers to keep in FP32 such that the gate passes.

    Args:
        layers: What the form quantizes, in the order of the graph.
        make: Makes the form with the layers of these names in FP32. It is never asked to keep all.
        measure: Error of a form's outputs against the original's, at least 0: a continuous figure, that ranks layers
            where a metric over few rows would not move. It need not be what the gate judges.
        evaluate: The gate.
        time: Seconds of one run of a form; without it every layer counts as gaining the same.
        on_line: Told what is going on.

    Raises:
        RequestError: There are no layers, or `measure` gives no finite figure.
    """
    if not layers:
        raise RequestError("there is nothing to search", "no layer is quantized")
    return _Search(layers, make, measure, evaluate, time, on_line).run()


@dataclass
class _Search(Generic[Form]):
    layers: Sequence[Layer]
    make: Callable[[Collection[str]], Form]
    measure: Callable[[Form], float]
    evaluate: Callable[[Form], Judgement]
    time: Callable[[Form], float] | None
    on_line: Callable[[str], None]
    runs: int = 0
    steps: list[dict[str, Any]] = field(default_factory=list)
    judged: dict[frozenset[str], Judgement] = field(default_factory=dict)

    def run(self) -> Search:
        plain = self.judge(frozenset())
        if plain.passed or len(self.layers) == 1:  # with its only layer in FP32 nothing would be quantized
            return Search(plain.passed, frozenset(), (), tuple(self.steps), self.runs)
        costs = self._costs()
        order = [cost.layer.name for cost in costs]
        kept = self._fewest(order)
        passed = kept is not None
        if kept is None:
            kept = min(self.judged, key=lambda names: (self.judged[names].drop, len(names)))
        else:
            kept = self._without_unneeded(kept, order)
        for cost in costs:
            cost.kept = cost.layer.name in kept
        return Search(passed, frozenset(kept), tuple(costs), tuple(self.steps), self.runs)

    def judge(self, kept: frozenset[str]) -> Judgement:
        if kept not in self.judged:
            self.on_line(f"the gate, with {len(kept)} of {len(self.layers)} layers in FP32")
            self.runs += 1
            found = self.judged[kept] = self.evaluate(self.make(kept))
            self.steps.append({"kept": len(kept), "passed": found.passed, "drop": found.drop, "told": found.told})
        return self.judged[kept]

    def _error(self, group: Sequence[Layer]) -> float:
        """Of the outputs with this group alone quantized."""
        quantized = {layer.name for layer in group}
        self.on_line(f"the error of {len(group)} of {len(self.layers)} layers")
        self.runs += 1
        error = self.measure(self.make(frozenset(layer.name for layer in self.layers) - quantized))
        if not math.isfinite(error):
            raise RequestError("the outputs of a quantized form have no finite error", error, ", ".join(quantized))
        return error

    def _costs(self) -> list[LayerCost]:
        """Harm of each layer over the time that it gains, the costliest first."""
        errors = self._errors()
        gains = self._gains()
        known = [gain for gain in gains.values() if gain > 0]
        least = _LEAST_GAIN * sum(known) / len(known) if known else 1.0
        raw = {name: cost.error**2 / max(gains.get(name, 1.0), least) for name, cost in errors.items()}
        total = sum(raw.values()) or 1.0
        for name, cost in errors.items():
            cost.gained_s = gains.get(name)
            cost.cost = raw[name] / total
        return sorted(errors.values(), key=lambda cost: -cost.cost)

    def _errors(self) -> dict[str, LayerCost]:
        """Groups in the order of the graph, the most harmful halved again and again. Squares of errors add up, nearly:
        roundings of different layers have little to do with each other."""
        size = max(1, math.isqrt(len(self.layers)))
        groups = [tuple(self.layers[i : i + size]) for i in range(0, len(self.layers), size)]
        leaves = {group: self._error(group) for group in groups}
        while divisible := [group for group in leaves if len(group) > 1]:
            worst = max(divisible, key=lambda group: leaves[group])
            if leaves[worst] ** 2 <= NEGLIGIBLE * sum(error**2 for error in leaves.values()):
                break
            del leaves[worst]
            for half in (worst[: len(worst) // 2], worst[len(worst) // 2 :]):
                leaves[half] = self._error(half)
        return {
            layer.name: LayerCost(layer, error / math.sqrt(len(group)), len(group))
            for group, error in leaves.items()
            for layer in group
        }

    def _gains(self) -> Mapping[str, float]:
        """Seconds that quantizing each layer gains: per kind, by keeping all of that kind."""
        if self.time is None:
            return {}
        kinds: dict[Hashable, list[Layer]] = {}
        for layer in self.layers:
            kinds.setdefault((layer.op, layer.kind), []).append(layer)
        if len(kinds) == 1:  # to keep all would leave nothing quantized, and one kind needs no order
            return {}
        self.on_line("the time that layers gain")
        whole = self.time(self.make(frozenset()))
        self.runs += 1
        gains = {}
        for members in kinds.values():
            self.runs += 1
            kept = self.time(self.make(frozenset(layer.name for layer in members)))
            gains.update({layer.name: (kept - whole) / len(members) for layer in members})
        return gains

    def _fewest(self, order: Sequence[str]) -> frozenset[str] | None:
        """The shortest beginning of `order` with which the gate passes, by doubling and halving."""
        most, failing, count = len(order) - 1, 0, 1
        while not self.judge(frozenset(order[:count])).passed:
            if count == most:
                return None
            failing, count = count, min(2 * count, most)
        while count - failing > 1:
            middle = (failing + count) // 2
            if self.judge(frozenset(order[:middle])).passed:
                count = middle
            else:
                failing = middle
        return frozenset(order[:count])

    def _without_unneeded(self, kept: frozenset[str], order: Sequence[str]) -> frozenset[str]:
        """Let go of each layer without which the gate passes as well, the cheapest first."""
        for name in reversed(order):
            if name in kept and len(kept) > 1 and self.judge(kept - {name}).passed:
                kept = kept - {name}
        return kept
