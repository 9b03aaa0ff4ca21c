"""The registered cases under pytest-benchmark: `pytest bench --benchmark-only -k gae`.

A group per case, with a benchmark for each way and each baseline, one after the other and with a warm cache: for
--benchmark-compare, --benchmark-histogram and the like. `python -m bench` makes the figures of the documents.
"""

import os

import pytest
import torch

from . import conftest
from .harness import CASES

HERE = [name for name, registered in CASES.items() if registered.device == "cpu" or torch.cuda.is_available()]


@pytest.mark.parametrize("name", HERE)
def test_case(name, benchmark):
    """Stands for the case until conftest.py has built it and knows its ways; runs where it cannot be built."""
    wanted = CASES[name].environment or {}
    if wanted.items() - os.environ.items():
        pytest.skip(f"needs a process started with {' '.join(f'{key}={value}' for key, value in wanted.items())}")
    conftest.build(name)
