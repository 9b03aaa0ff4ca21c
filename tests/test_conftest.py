"""The safety nets of conftest.py hold."""

import pytest
import torch


def test_uninitialised_memory_is_poisoned():
    x = torch.zeros(4)
    for empty in torch.empty(8), torch.empty_like(x), x.new_empty(8), torch.empty_strided((2, 2), (2, 1)):
        assert empty.isnan().all()
    assert (torch.empty(8, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


@pytest.mark.unpoisoned
def test_unpoisoned_runs_without_deterministic_mode():
    assert not torch.are_deterministic_algorithms_enabled()
