"""Scans of 16M rows, one sequence or many of lognormal lengths, 200 times: the same bits. On the CPU fewer of both."""

import math

import pytest
import torch
from scans import SCANS, problem

pytestmark = pytest.mark.unpoisoned


def lengths(kind: str, num_tokens: int) -> list[int]:
    if kind == "one":
        return [num_tokens]
    median = num_tokens**0.5 / 8
    drawn = torch.randn(64 * num_tokens // int(median), generator=torch.Generator().manual_seed(0)) + math.log(median)
    ends = drawn.exp().ceil().long().cumsum(0)
    ends = torch.cat([torch.tensor([0]), ends[ends < num_tokens], torch.tensor([num_tokens])])
    return ends.diff().tolist()


@pytest.mark.parametrize("kind", ["one", "lognormal"])
@pytest.mark.parametrize("name", SCANS)
def test_the_same_bits_every_time(name, kind, device):
    """Compared on the device, so that launch follows launch."""
    num_tokens, repeats = (1 << 16, 5) if device == "cpu" else (1 << 24, 200)
    p = problem(name, lengths(kind, num_tokens))
    columns, cu, mask, bootstrap = (x.to(device) for x in p[:4])

    def scan() -> tuple[torch.Tensor, ...]:
        return SCANS[name].op(columns, cu, bootstrap=bootstrap, mask=mask)

    first = [x.view(torch.int32) for x in scan()]
    same = torch.ones((), dtype=torch.bool, device=device)
    for _ in range(repeats):
        for x, y in zip(first, scan(), strict=True):
            same &= (x == y.view(torch.int32)).all()
    assert same
