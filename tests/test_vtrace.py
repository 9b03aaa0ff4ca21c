"""vtrace: hand-computed values, its limits, compilation, errors. test_scan.py has what all scans promise."""

import pytest
import torch
from scans import problem

from qrm_fast import gae, vtrace
from qrm_fast.ops.vtrace import _vtrace


@pytest.mark.parametrize("op", [_vtrace, _vtrace.reference], ids=["kernel", "reference"])
def test_hand_computed(op):
    columns = torch.tensor([[1.0, 2], [0.5, 1], [2, 0.5]])  # rewards, values, ratios
    cu, bootstrap = torch.tensor([0, 2]), torch.tensor([2.0])
    # last row: rho = 1/2, delta = (2 + 1 - 1) / 2; first row: rho = c = 1, delta = 1 + 1/2 - 1/2, A = 1 + 1/2
    targets, advantages = op(*columns, cu, 0.5, 1.0, 1.0, 1.0, bootstrap, None)
    assert targets.tolist() == [2, 2] and advantages.tolist() == [1.5, 1]
    # first row: rho = 2, c = 1/2
    targets, advantages = op(*columns, cu, 0.5, 0.5, 2.0, 1.0, bootstrap, None)
    assert targets.tolist() == [2.75, 2] and advantages.tolist() == [3, 1]
    # the last row is an observation: the first sees the bootstrap value
    targets, advantages = op(*columns, cu, 0.5, 1.0, 1.0, 1.0, bootstrap, torch.tensor([True, False]))
    assert targets.tolist() == [2, 0] and advantages.tolist() == [1.5, 0]


def test_on_policy_it_is_gae():
    """With ratios of 1 the targets are gae's returns: IMPALA's remark 1, with lam its remark 2."""
    p = problem("vtrace", [9, 70, 1, 300])
    options = {"gamma": 0.9, "lam": 0.8, "bootstrap": p.bootstrap, "mask": p.mask}
    ours = vtrace(p.columns[0], p.columns[1], torch.ones_like(p.columns[2]), p.cu, **options)
    torch.testing.assert_close(ours.targets, gae(p.columns[0], p.columns[1], p.cu, **options).returns)


@pytest.mark.parametrize("bars", [(0.5, 2.0), (3.0, 0.7)])
def test_bars_apart(bars):
    p = problem("vtrace", [9, 70, 1, 300])
    ours = vtrace(*p.columns, p.cu, gamma=0.9, lam=0.8, rho_bar=bars[0], c_bar=bars[1], mask=p.mask)
    wide = _vtrace.reference(*p.columns.double(), p.cu, 0.9, 0.8, *bars, None, p.mask)
    for got, want in zip(ours, wide, strict=True):
        torch.testing.assert_close(got, want.float())


def test_a_ratio_of_nan_reaches_all_before_it_and_one_of_zero_cuts():
    p = problem("vtrace", [30])
    p.columns[2, 20] = torch.nan
    targets, advantages = vtrace(*p.columns, p.cu)
    assert targets[:21].isnan().all() and advantages[:21].isnan().all() and targets[21:].isfinite().all()
    p.columns[2, 10] = 0
    p.columns[2, 20] = 1
    cut = vtrace(*p.columns, p.cu)
    short = vtrace(*p.columns[:, :10], torch.tensor([0, 10]), bootstrap=p.columns[1, 10:11])
    assert cut.targets[10] == p.columns[1, 10]
    torch.testing.assert_close(cut.targets[:10], short.targets)


def test_opcheck():
    p = problem("vtrace", [3, 0, 4, 6])
    torch.library.opcheck(_vtrace.op, (*p.columns, p.cu, 0.9, 0.8, 1.0, 1.0, p.bootstrap, p.mask))
    torch.library.opcheck(_vtrace.op, (*p.columns.half(), p.cu.long(), 1.0, 1.0, 2.0, 1.0, None, None))


def test_compiles_whole_and_for_any_length():
    compiled = torch.compile(vtrace, fullgraph=True, dynamic=True)
    for lengths in [3, 4, 9, 5], [8, 1, 6, 6, 70, 2], [1, 2]:
        p = problem("vtrace", lengths)
        options = {"gamma": 0.9, "rho_bar": 2.0, "bootstrap": p.bootstrap, "mask": p.mask}
        for graph, eager in zip(
            compiled(*p.columns, p.cu, **options), vtrace(*p.columns, p.cu, **options), strict=True
        ):
            assert torch.equal(graph, eager)


@pytest.mark.parametrize("name", ["values", "ratios"])
def test_bad_input(name):
    columns = dict.fromkeys(("rewards", "values", "ratios"), torch.zeros(4))
    cu = torch.tensor([0, 4])
    with pytest.raises(TypeError, match=rf"{name} must be \[T\] float32, got \[4\] bfloat16"):
        vtrace(**columns | {name: torch.zeros(4).bfloat16()}, cu_seqlens=cu)
    with pytest.raises(ValueError, match=rf"{name} must be \[T\] float32 with T = 4, got \[3\] float32"):
        vtrace(**columns | {name: torch.zeros(3)}, cu_seqlens=cu)
