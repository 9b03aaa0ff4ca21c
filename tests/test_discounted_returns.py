"""discounted_returns: hand-computed values, compilation, errors. test_scan.py has what all scans promise."""

import pytest
import torch
from scans import problem

from qrm_fast import discounted_returns
from qrm_fast.ops.discounted_returns import _discounted_returns


@pytest.mark.parametrize("op", [_discounted_returns, _discounted_returns.reference], ids=["kernel", "reference"])
def test_hand_computed(op):
    rewards, cu, bootstrap = torch.tensor([1.0, 2, 3]), torch.tensor([0, 3]), torch.tensor([4.0])
    assert op(rewards, cu, 0.5, None, None).tolist() == [2.75, 3.5, 3]
    assert op(rewards, cu, 0.5, bootstrap, None).tolist() == [3.25, 4.5, 5]
    # through the observation in the middle the return passes undiscounted
    assert op(rewards, cu, 0.5, bootstrap, torch.tensor([True, False, True])).tolist() == [3.5, 0, 5]
    assert op(rewards, torch.tensor([0, 1, 1, 3]), 1.0, None, None).tolist() == [1, 5, 3]


def test_opcheck():
    p = problem("discounted_returns", [3, 0, 4, 6])
    torch.library.opcheck(_discounted_returns.op, (p.columns[0], p.cu, 0.9, p.bootstrap, p.mask))
    torch.library.opcheck(_discounted_returns.op, (p.columns[0].bfloat16(), p.cu.long(), 1.0, None, None))


def test_compiles_whole_and_for_any_length():
    compiled = torch.compile(discounted_returns, fullgraph=True, dynamic=True)
    for lengths in [3, 4, 9, 5], [8, 1, 6, 6, 70, 2], [1, 2]:
        p = problem("discounted_returns", lengths)
        options = {"gamma": 0.9, "bootstrap": p.bootstrap, "mask": p.mask}
        eager = discounted_returns(p.columns[0], p.cu, **options)
        assert torch.equal(compiled(p.columns[0], p.cu, **options), eager)


def test_bad_rewards():
    with pytest.raises(TypeError, match=r"rewards must be \[T\] .* got \[4\] int64"):
        discounted_returns(torch.zeros(4).long(), torch.tensor([0, 4]))
