"""Puts a benchmark of every way in the place of each chosen case: its ways are known once it is built."""

import importlib
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from .harness import CASES, Case, Provider

for path in sorted(Path(__file__).parent.glob("bench_*.py")):
    importlib.import_module(f"{__package__}.{path.stem}")


@lru_cache(maxsize=1)  # the ways of a case follow each other, and two cases may not fit into memory
def build(name: str) -> Case:
    return CASES[name].build()


@lru_cache(maxsize=1)
def gated(name: str) -> dict[str, Provider]:
    """The ways and baselines of a case whose result is right."""
    build(name).gate()
    return ways(name)


def ways(name: str) -> dict[str, Provider]:
    return build(name).providers | build(name).baseline


@pytest.hookimpl(trylast=True)  # after -k has chosen
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [each for item in items for each in benchmarks(item)]


def benchmarks(item: pytest.Item) -> list[pytest.Item]:
    if item.path != Path(__file__).with_name("test_cases.py"):
        return [item]
    name = item.callspec.params["name"]
    if (CASES[name].environment or {}).items() - os.environ.items():
        return [item]
    try:
        tests = {way: measured(name, way) for way in ways(name)}
        tests |= {way: skipped(why) for way, why in build(name).absent.items()}
    except Exception:  # the item meets it again and reports it
        return [item]
    return [
        pytest.Function.from_parent(item.parent, name=f"{item.name} {way}", callobj=test) for way, test in tests.items()
    ]


def measured(name: str, way: str) -> Callable:
    def test(benchmark):
        provider = gated(name)[way]
        benchmark.group, benchmark.name = name, way
        benchmark(provider if CASES[name].device == "cpu" else lambda: (provider(), torch.cuda.synchronize()))

    return test


def skipped(why: str) -> Callable:
    def test(benchmark):
        pytest.skip(why)

    return test
