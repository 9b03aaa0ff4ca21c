"""min_gae: hand-computed values, its limits, compilation, errors. test_scan.py has what all scans promise."""

import math

import pytest
import torch
from scans import problem

from qrm_fast import min_gae
from qrm_fast.ops.min_gae import _min_gae


@pytest.mark.parametrize("op", [_min_gae, _min_gae.reference], ids=["kernel", "reference"])
def test_hand_computed(op):
    rewards, values = torch.tensor([0.5, math.inf, 0.25]), torch.tensor([0.25, 0.5, 1.0])
    cu, bootstrap = torch.tensor([0, 3]), torch.tensor([-1.0])
    # Q = 1/4, then (1 + 1/4) / 2, then min(1/2, (1/2 + 5/8) / 2)
    advantages, returns = op(rewards, values, cu, 0.5, None, None)
    assert returns.tolist() == [0.5, 0.625, 0.25] and advantages.tolist() == [0.25, 0.125, -0.75]
    # the last row sees min(1/4, -1)
    advantages, returns = op(rewards, values, cu, 0.5, bootstrap, None)
    assert returns.tolist() == [0.25, 0, -1] and advantages.tolist() == [0, -0.5, -2]
    # the middle row is an observation: min(1/2, (1 + 1/4) / 2)
    _, returns = op(rewards, values, cu, 0.5, None, torch.tensor([True, False, True]))
    assert returns.tolist() == [0.5, 0, 0.25]
    # lam 1: the smallest reward to come; lam 0: the next value, also behind the last step reward
    assert op(rewards, values, cu, 1.0, None, None)[1].tolist() == [0.25, 0.25, 0.25]
    assert op(rewards, values, cu, 0.0, None, None)[1].tolist() == [0.5, 1, 0.25]
    rewards = torch.tensor([0.5, math.inf, math.inf])
    assert op(rewards, values, cu, 0.0, None, None)[1].tolist() == [0.5, 1, math.inf]
    assert op(rewards, values, cu, 0.5, None, None)[1].tolist() == [0.5, math.inf, math.inf]


def test_golden_reverse_minimum_of_pure():
    """The strict min-form of (.9, .8, .95, -.6, .7), each step's tokens holding its return."""
    steps, ends = [0.9, 0.8, 0.95, -0.6, 0.7], [2, 3, 9, 10, 20]
    rewards = torch.full((21,), math.inf).index_put((torch.tensor(ends),), torch.tensor(steps))
    returns = min_gae(rewards, torch.zeros(21), torch.tensor([0, 21]), lam=1.0).returns
    assert returns.tolist() == torch.tensor([-0.6] * 11 + [0.7] * 10).tolist()


def test_opcheck():
    p = problem("min_gae", [3, 0, 4, 6])
    torch.library.opcheck(_min_gae.op, (*p.columns, p.cu, 0.9, p.bootstrap, p.mask))
    torch.library.opcheck(_min_gae.op, (*p.columns.half(), p.cu.long(), 1.0, None, None))


def test_compiles_whole_and_for_any_length():
    compiled = torch.compile(min_gae, fullgraph=True, dynamic=True)
    for lengths in [3, 4, 9, 5], [8, 1, 6, 6, 70, 2], [1, 2]:
        p = problem("min_gae", lengths)
        options = {"lam": 0.9, "bootstrap": p.bootstrap, "mask": p.mask}
        for graph, eager in zip(
            compiled(*p.columns, p.cu, **options), min_gae(*p.columns, p.cu, **options), strict=True
        ):
            assert torch.equal(graph, eager)


@pytest.mark.parametrize("lam", [-0.1, 1.5, math.nan])
def test_bad_lam(lam):
    x = torch.zeros(4)
    with pytest.raises(ValueError, match=rf"lam must be in \[0, 1\], got {lam}"):
        min_gae(x, x, torch.tensor([0, 4]), lam=lam)
