"""Benchmarks keep up with what they measure."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import benchmarks

ELSEWHERE = {"benchmarks.__main__", "benchmarks.scaling_plot", "benchmarks.sides.dynamo_side"}
"""Runs when imported; needs the extra ``bench``; runs in its own environment."""
MODULES = {module.name for module in pkgutil.walk_packages(benchmarks.__path__, "benchmarks.")} - ELSEWHERE


@pytest.mark.parametrize("module", sorted(MODULES))
def test_all_that_a_benchmark_imports_is_there(module: str) -> None:
    assert importlib.import_module(module).__doc__
