"""The factors of SmoothQuant, and whether the error that they promise is the one that rounding really leaves."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.factors import ALPHAS, Operands, by_what_they_share, choose_factors, expected_error, smoothing_factors
from calibration.quantize.weights import quantize_weight
from exporter.errors import RequestError


def product(seed: int, outlier: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (tokens, 32) with a channel that is `outlier` times as large, and weights (32, 24)."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((500, 32)).astype(np.float32)
    x[:, 5] *= outlier
    return x, (rng.standard_normal((32, 24)) / 6).astype(np.float32)


def operands(x: np.ndarray, *weights: np.ndarray) -> Operands:
    return Operands(x.min(axis=0), x.max(axis=0), np.square(x, dtype=np.float64).mean(axis=0), weights)


def rounding_error(x: np.ndarray, weight: np.ndarray, factors: np.ndarray) -> float:
    """Mean power, per token, of the error of a product that is smoothed and then rounded to uint8 and int8."""
    wanted = x.astype(np.float64) @ weight
    x, weight = x / factors, weight * factors[:, None]
    step = (max(x.max(), 0) - min(x.min(), 0)) / 255
    return float(((np.round(x / step) * step @ quantize_weight(weight, 1).restored() - wanted) ** 2).sum(axis=1).mean())


def test_factors_are_equation_4() -> None:
    found = smoothing_factors(np.array([8.0, 2.0, 0.5]), np.array([0.5, 0.02, 2.0]), 0.5)
    np.testing.assert_allclose(found, [4.0, 10.0, 0.5], rtol=1e-6)
    found = smoothing_factors(np.array([8.0, 2.0]), np.array([0.5, 0.25]), 0.75)
    np.testing.assert_allclose(found, [8**0.75 / 0.5**0.25, 2**0.75 / 0.25**0.25], rtol=1e-6)


def test_half_gives_both_sides_the_same_sizes() -> None:
    x, weight = product(0, 30)
    factors = smoothing_factors(np.abs(x).max(axis=0), np.abs(weight).max(axis=1), 0.5)
    both = np.abs(x / factors).max(axis=0), np.abs(weight * factors[:, None]).max(axis=1)
    np.testing.assert_allclose(*both, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_dead_channels_stay_as_they_are(alpha: float) -> None:
    found = smoothing_factors(np.array([0.0, 3.0, 4.0]), np.array([1.0, 0.0, 4.0]), alpha)
    np.testing.assert_array_equal(found[:2], 1)
    assert smoothing_factors(np.zeros(4), np.zeros(4), alpha).tolist() == [1, 1, 1, 1]


def test_nearly_dead_channel_gets_no_extreme_factor() -> None:
    """Other data may wake it up: a value of 1 there must not become 1e9 after division."""
    found = smoothing_factors(np.array([1e-20, 10.0]), np.array([1.0, 1.0]), 0.5)
    assert found[0] == pytest.approx(np.sqrt(10 * 1e-5))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_out_of_range(alpha: float) -> None:
    with pytest.raises(RequestError, match="out of range"):
        smoothing_factors(np.ones(2), np.ones(2), alpha)


@pytest.mark.parametrize("outlier", [1.0, 10.0, 60.0])
@pytest.mark.parametrize("alpha", [None, 0.3, 0.5, 0.8])
def test_expected_error_is_what_rounding_leaves(outlier: float, alpha: float | None) -> None:
    x, weight = product(1, outlier)
    factors = (
        np.ones(32, np.float32)
        if alpha is None
        else smoothing_factors(np.abs(x).max(axis=0), np.abs(weight).max(axis=1), alpha)
    )
    assert expected_error([operands(x, weight)], factors) == pytest.approx(rounding_error(x, weight, factors), rel=0.1)


def test_alpha_of_a_group_is_the_one_that_errs_least() -> None:
    x, weight = product(2, 40)
    other = product(3)[1]
    chosen, factors, share = choose_factors([operands(x, weight, other)], None)
    assert chosen in ALPHAS
    errors = {}
    for alpha in ALPHAS:
        tried = choose_factors([operands(x, weight, other)], alpha)[1]
        errors[alpha] = rounding_error(x, weight, tried) + rounding_error(x, other, tried)
    assert errors[chosen] < 1.02 * min(errors.values())
    plain = rounding_error(x, weight, np.ones(32)) + rounding_error(x, other, np.ones(32))
    assert share == pytest.approx(errors[chosen] / plain, rel=0.1)
    assert share < 0.2
    largest = np.maximum(np.abs(weight), np.abs(other)).max(axis=1)
    np.testing.assert_allclose(factors, smoothing_factors(np.abs(x).max(axis=0), largest, chosen), rtol=1e-6)


def test_what_shares_anything_goes_together() -> None:
    nodes = ["a1", "b2", "a3", "c4", "d2", "e5", "e1"]
    assert by_what_they_share(nodes, lambda node: node) == [["a1", "a3", "e5", "e1"], ["b2", "d2"], ["c4"]]
