from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = ("exporter", "pipelines", "pipelines.recipe")


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
