from __future__ import annotations

import itertools

from exporter.targets.shape_cache import PATIENCE, ShapeCache


def test_a_frequent_shape_gets_a_place_and_later_that_of_another() -> None:
    cache: ShapeCache[str] = ShapeCache(1)
    for _ in range(PATIENCE - 1):
        assert cache.find("a", lambda: "made for a") is None
        assert cache.find("b", lambda: "made for b") is None
    assert cache.find("a", lambda: "made for a") == "made for a"
    assert cache.find("a", lambda: "made again") == "made for a"
    assert cache.find("b", lambda: "made for b") == "made for b"
    assert list(cache.held) == ["b"]
    for _ in range(2 * PATIENCE - 1):
        assert cache.find("c", lambda: "made for c") is None
    assert cache.find("c", lambda: "made for c") == "made for c"


def test_many_shapes_cost_little() -> None:
    """Ten equally frequent shapes and two places: of 100,000 runs a dozen or so make something."""
    cache: ShapeCache[object] = ShapeCache(2)
    made = itertools.count()
    for run in range(100_000):
        cache.find(run % 10, lambda: next(made))
    assert 2 < next(made) < 20


def test_what_is_asked_for_by_name_is_made_at_once() -> None:
    cache: ShapeCache[int] = ShapeCache(1)
    for shape in (1, 2, 1):
        assert cache.get(shape, lambda shape=shape: shape) == shape
        assert list(cache.held) == [shape]
