"""The scans on a GPU, through the public functions: the kernels that serve them there, across blocks and groups."""

import math

import pytest
import torch
from cuda_graph import replayed
from scans import SCANS, Problem, decays, loop, problem

LENGTHS = [300_000, 5, 0, 1024, 1025, 1, 33, 140_000, 16, 2000]  # beyond two groups of blocks, and around every cut
every_scan = pytest.mark.parametrize("name", SCANS)
pytestmark = pytest.mark.gpu


def results(name: str, p: Problem, **options: float) -> tuple[torch.Tensor, ...]:
    """On the GPU, with the problem's mask and bootstrap."""
    columns, cu, mask, bootstrap = (x.cuda() for x in p[:4])
    return SCANS[name].op(columns, cu, mask=mask, bootstrap=bootstrap, **options)


@every_scan
@pytest.mark.parametrize("decay", [0.0, 0.95, 1.0])
def test_as_the_cpu_kernel_in_float64(name, decay):
    """Rounding over some 20 steps of a tree of float32."""
    p = problem(name, LENGTHS)
    wide = {"mask": p.mask, "bootstrap": p.bootstrap.double()}
    exact = SCANS[name].op(p.columns.double(), p.cu, **wide, **decays(name, decay))
    for ours, want in zip(results(name, p, **decays(name, decay)), exact, strict=True):
        torch.testing.assert_close(ours.cpu().double(), want, rtol=1e-5, atol=1e-4 if decay < 1 else 1e-2)


@every_scan
@pytest.mark.unpoisoned
def test_bits_do_not_depend_on_packing_or_timing(name):
    p = problem(name, LENGTHS)
    packed, again = results(name, p), results(name, p)
    order = list(range(len(LENGTHS)))[::-1]
    shuffled, rows = results(name, p.take(order)), torch.cat([p.sequences()[i] for i in order]).cuda()
    for ours, same, other in zip(packed, again, shuffled, strict=True):
        assert torch.equal(ours, same) and torch.equal(ours[rows], other)
    for i, rows in enumerate(p.sequences()):
        for ours, alone in zip(packed, results(name, p.take([i])), strict=True):
            assert torch.equal(ours[rows.cuda()], alone)


@every_scan
def test_masked_rows_are_never_read(name):
    p = problem(name, LENGTHS)
    whole = results(name, p)
    poisoned = results(name, p._replace(columns=p.columns.where(p.mask, math.nan)))
    for before, after in zip(whole, poisoned, strict=True):
        assert torch.equal(before, after) and not after[~p.mask.cuda()].any()


@every_scan
@pytest.mark.parametrize("bad, decay", [(math.inf, 0.01), (-math.inf, 1.0), (math.nan, 0.0)])
def test_infinite_rewards_reach_what_a_loop_lets_them_reach(name, bad, decay):
    """Also across blocks and groups, where a decay of 0.01 per row has long underflowed."""
    p = problem(name, [3, 140_000, 2])
    p.columns[0].nan_to_num_(posinf=0.5)
    p.columns[0, 139_950] = bad
    both = SCANS[name].op(p.columns.cuda(), p.cu.cuda(), **decays(name, decay))
    for rows in p.sequences():
        for ours, want in zip(both, loop(name, p.columns[:, rows], None, decay), strict=True):
            got = ours[rows.cuda()].cpu()
            assert ((got == want) | (got.isnan() & want.isnan()) | (got.isfinite() & want.isfinite())).all()


@every_scan
def test_broken_boundaries_give_nan_and_nothing_outside(name):
    wide = torch.full((3, 300), 7.0, device="cuda")
    for bounds in [0, 500], [-50, 90], [90, 10, 100], [1 << 40, 3], [0, 99], [0, 60, 40, 100], [0]:
        columns = wide[: SCANS[name].num_columns, 100:200]
        for x in SCANS[name].op(columns, torch.tensor(bounds, device="cuda")):
            assert x.isnan().all()
    assert (wide == 7).all()


@every_scan
@pytest.mark.unpoisoned
def test_nothing_waits_and_a_graph_captures_it(name):
    p = problem(name, LENGTHS)
    columns, cu, mask, bootstrap = (x.cuda() for x in p[:4])

    def step():
        return SCANS[name].op(columns, cu, mask=mask, bootstrap=bootstrap)

    step()
    torch.cuda.set_sync_debug_mode("error")
    direct = step()
    torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, replayed(step), direct))
