"""The factors of SmoothQuant: how much of an activation's range the weights take over, and what that promises."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

from calibration.quantize.products import Kept
from calibration.quantize.weights import LARGEST
from exporter.errors import RequestError

Array = np.ndarray
Node = TypeVar("Node")
ALPHA = 0.5
"""What the paper takes for most models: activations and weights get channels of the same largest values."""
ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""What is tried where each group of products may have an alpha of its own."""
FAINTEST = 1e-5
"""A channel whose largest value is below this share of the tensor's counts as that large: other data may wake it, and
division by a smaller factor would make it an outlier then."""
WORTH_AN_OPERATOR = 0.8
"""An operator is added only where the power of the rounding error is expected to fall at least to this share."""


@dataclass(frozen=True)
class Operands:
    """An activation and the weights of the products that read it.

    Attributes:
        low, high: Smallest and largest value per channel, (channels,).
        power: Mean square per channel, (channels,).
        weights: float32 (channels, outputs) each.
    """

    low: Array
    high: Array
    power: Array
    weights: Sequence[Array]

    @property
    def largest(self) -> Array:
        """Largest absolute value per channel of the activation, (channels,)."""
        return np.asarray(np.maximum(np.abs(self.low), np.abs(self.high)))


def smoothing_factors(activation: Array, weight: Array, alpha: float = ALPHA) -> Array:
    """The factors by which an activation is divided and its weights are multiplied, per channel.

    ``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`` (Xiao et al., 2022, equation 4). A channel that is zero on either
    side has nothing to move: 1.

    Args:
        activation: Largest absolute value per channel, (channels,).
        weight: Largest absolute weight per channel, over all that read the activation, (channels,).
        alpha: From 0 (the weights' rows get one size) to 1 (the activation's channels do).

    Returns:
        float32 (channels,), positive and finite.

    Raises:
        RequestError: `alpha` is not in that range.
    """
    if not 0 <= alpha <= 1:
        raise RequestError("the strength of smoothing is out of range", alpha, "Give an alpha from 0 to 1")
    x, w = np.asarray(activation, np.float64), np.asarray(weight, np.float64)
    alive = (x > 0) & (w > 0)
    x, w = (np.maximum(values, values.max(initial=0.0) * FAINTEST)[alive] for values in (x, w))
    factors = np.ones(len(alive))
    factors[alive] = x**alpha / w ** (1 - alpha)
    return factors.astype(np.float32)


def expected_error(operands: Sequence[Operands], factors: Array) -> float:
    """The mean power of the error that int8 is expected to leave in the outputs of smoothed products, per token.

    A rounded value errs evenly over its step, by step²/12 in the mean square, and independently of the others:
    ``step(X)²/12 · sum W² + sum E[X²] · sum step(W_k)²/12``, with one step for the activation and one per output.

    Args:
        operands: Activations with the products that read them.
        factors: (channels,); ones for the products as they are.
    """
    total = 0.0
    wide = factors.astype(np.float64)
    for operand in operands:
        low = min(0.0, float((operand.low / wide).min()))
        high = max(0.0, float((operand.high / wide).max()))
        step, power = (high - low) / 255, float((operand.power / wide**2).sum())
        for weight in operand.weights:
            scaled = np.abs(weight) * factors[:, None]
            steps = scaled.max(axis=0).astype(np.float64) / LARGEST["int8"]
            total += (step**2 * float(np.square(scaled, dtype=np.float64).sum()) + power * float((steps**2).sum())) / 12
    return total


def choose_factors(operands: Sequence[Operands], alpha: float | None) -> tuple[float, Array, float]:
    """Factors that activations and products have in common.

    Args:
        operands: All with the same channels.
        alpha: See `smoothing_factors`; ``None`` takes the one of `ALPHAS` that promises the least error.

    Returns:
        Alpha, the factors, and the expected error with them as a share of that without; 1 where there is none without.

    Raises:
        RequestError: `alpha` is out of range.
    """
    activation = np.max([operand.largest for operand in operands], axis=0)
    weight = np.max([np.abs(rows).max(axis=1) for operand in operands for rows in operand.weights], axis=0)
    before = expected_error(operands, np.ones_like(activation))
    tried = []
    for one in ALPHAS if alpha is None else (alpha,):
        factors = smoothing_factors(activation, weight, one)
        tried.append((one, factors, expected_error(operands, factors) / before if before else 1.0))
    return min(tried, key=lambda entry: entry[2])


def by_what_they_share(nodes: Sequence[Node], keys: Callable[[Node], Iterable[Hashable]]) -> list[list[Node]]:
    """Parts such that nodes with a key in common are in one part, in the order of `nodes`.

    With activation and weight as keys, products of one activation go together, and so do those of one weight: it stays
    stored once.
    """
    parts: list[tuple[set[Hashable], list[int]]] = []
    for place, node in enumerate(nodes):
        known, places = set(keys(node)), [place]
        for part in [part for part in parts if part[0] & known]:
            parts.remove(part)
            known, places = known | part[0], part[1] + places
        parts.append((known, sorted(places)))
    return [[nodes[place] for place in places] for _, places in sorted(parts, key=lambda part: part[1])]


def no_gain(name: str, op: str, alpha: float, error: float) -> Kept:
    """A product that stays as it is, because smoothing is not expected to leave less error."""
    why = f"smoothing (alpha {alpha:g}) is expected to leave {error:.2f} times the rounding error"
    return Kept(name, op, "no_gain", why)


def group_record(
    names: Sequence[str], activations: Sequence[dict[str, Any]], alpha: float, factors: Array, error: float
) -> dict[str, Any]:
    """A smoothed group as the record has it: its products, what became of its activations, and the figures."""
    return {
        "products": list(names),
        "activations": list(activations),
        "alpha": alpha,
        "factor_min": float(factors.min()),
        "factor_max": float(factors.max()),
        "expected_error": error,
    }


def smoothing_record(alpha: float | None, groups: Sequence[dict[str, Any]], kept: Sequence[Kept]) -> dict[str, Any]:
    """The record of smoothing a model, see `calibration.smooth.smooth`."""
    inserted = sum(entry["how"] == "inserted" for group in groups for entry in group["activations"])
    return {"alpha": alpha, "groups": list(groups), "inserted": inserted, "kept": [asdict(entry) for entry in kept]}
