"""The Triton scans, which serve CUDA where nvcc was missing at installation: float64, bits, masks, boundaries.

In the interpreter trees are of a few rows, so that short sequences have many pieces, groups and chunks of groups.
"""

import math
import subprocess
import sys
import textwrap

import pytest
import torch
from accuracy import assert_as_accurate
from scans import SCANS, decays, loop, problem
from triton import knobs

from qrm_fast.ops import hopper
from qrm_fast.triton import discounted_returns, gae, min_gae, scan, vtrace

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")  # interpreter
LENGTHS = [3, 1, 0, 8, 140 if knobs.runtime.interpret else 5000, 0, 33, 9, 0]  # one has several groups of pieces
every_scan = pytest.mark.parametrize("name", SCANS)


@pytest.fixture(autouse=True)
def small_tree(monkeypatch):
    if knobs.runtime.interpret:
        monkeypatch.setattr(scan, "PIECE", 8)
        monkeypatch.setattr(scan, "GROUP", 4)
        monkeypatch.setattr(scan, "SETUP_PROGRAMS", 2)
        monkeypatch.setitem(scan.SETUP, "BS", 4)
        monkeypatch.setitem(scan.STATES, "BG", 4)


def launch_here(name, columns, cu, *, gamma=1.0, lam=None, bootstrap=None, mask=None):
    """The results of the Triton scan where its tensors are; lam defaults as in the public functions."""
    if name == "gae":
        return gae.launch(*columns, cu, gamma, 0.95 if lam is None else lam, None, bootstrap, mask)
    if name == "discounted_returns":
        return (discounted_returns.launch(*columns, cu, gamma, bootstrap, mask),)
    if name == "min_gae":
        return min_gae.launch(*columns, cu, 0.95 if lam is None else lam, bootstrap, mask)
    return vtrace.launch(*columns, cu, gamma, 1.0 if lam is None else lam, 1.0, 1.0, bootstrap, mask)


def launch(name, columns, cu, *, bootstrap=None, mask=None, device="cpu", **decays):
    """The same with tensors moved there, results on the CPU."""
    columns, cu, bootstrap, mask = (x if x is None else x.to(device) for x in (columns, cu, bootstrap, mask))
    return tuple(x.cpu() for x in launch_here(name, columns, cu, bootstrap=bootstrap, mask=mask, **decays))


@every_scan
@pytest.mark.parametrize(
    "decay, bootstrapped, masked", [(0.0, True, False), (0.5, False, False), (0.95, True, True), (1.0, False, True)]
)
def test_no_further_from_float64_than_pytorch(name, decay, bootstrapped, masked, triton_device):
    p = problem(name, LENGTHS)
    options = decays(name, decay) | ({"mask": p.mask} if masked else {})
    own, wide = ({"bootstrap": p.bootstrap}, {"bootstrap": p.bootstrap.double()}) if bootstrapped else ({}, {})
    exact = SCANS[name].reference(p.columns.double(), p.cu, **options, **wide)
    peer = SCANS[name].reference(p.columns, p.cu, **options, **own)
    results = launch(name, p.columns, p.cu, **options, **own, device=triton_device)
    for ours, want, torchs in zip(results, exact, peer, strict=True):
        finite = want.isfinite()
        assert torch.equal(ours[~finite].double(), want[~finite])
        assert_as_accurate(ours[finite], want[finite], torchs[finite], slack=4)  # a tree of float32 maps


@every_scan
@pytest.mark.parametrize("decay", [0.0, 0.95, 1.0])
def test_over_several_groups_of_pieces(name, decay, triton_device):
    """Sequences around every cut of the tree, the longest of more groups than a program joins at a time: on a GPU 2.1M
    rows. Rounding over some 20 steps of a tree of float32."""
    group, joined = scan.PIECE * scan.GROUP, scan.STATES["BG"]
    p = problem(name, [5, (2 * joined + 3) * group + 7, 0, group, 3 * group + 1, group - 1, 2 * group, 1])
    wide = {"mask": p.mask, "bootstrap": p.bootstrap.double()}
    exact = SCANS[name].op(p.columns.double(), p.cu, **wide, **decays(name, decay))
    options = {"mask": p.mask, "bootstrap": p.bootstrap, "device": triton_device, **decays(name, decay)}
    for ours, want in zip(launch(name, p.columns, p.cu, **options), exact, strict=True):
        torch.testing.assert_close(ours.double(), want, rtol=1e-5, atol=1e-4 if decay < 1 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype, triton_device):
    p = problem("vtrace", [3, 0, 41, 9], dtype)
    (*narrow,) = launch("vtrace", p.columns, p.cu.long(), bootstrap=p.bootstrap, mask=p.mask, device=triton_device)
    wide = launch("vtrace", p.columns.float(), p.cu, bootstrap=p.bootstrap, mask=p.mask, device=triton_device)
    assert all(map(torch.equal, narrow, wide)) and narrow[0].dtype == torch.float32


def test_lam_per_sequence(triton_device):
    p = problem("gae", [50, 9, 0, 3])
    lam = torch.tensor([0.9, 0.0, 0.3, 1.0])
    arguments = *p.columns, p.cu, 0.9, 1.0, lam, p.bootstrap, p.mask
    ours = gae.launch(*(x.to(triton_device) if isinstance(x, torch.Tensor) else x for x in arguments))
    for i, rows in enumerate(p.sequences()):
        one = p.take([i])
        options = {"gamma": 0.9, "lam": lam[i].item(), "bootstrap": one.bootstrap, "mask": one.mask}
        alone = SCANS["gae"].op(one.columns, one.cu, **options)
        for got, want in zip(ours, alone, strict=True):
            torch.testing.assert_close(got[rows].cpu(), want)


@pytest.mark.unpoisoned
@every_scan
def test_bits_do_not_depend_on_the_packing(name, triton_device):
    p = problem(name, [20, 5, 0, 140, 1, 33, 8])
    packed, again = (
        launch(name, p.columns, p.cu, bootstrap=p.bootstrap, mask=p.mask, device=triton_device) for _ in range(2)
    )
    order = [5, 3, 6, 1, 2, 0, 4]
    other = p.take(order)
    shuffled = launch(name, other.columns, other.cu, bootstrap=other.bootstrap, mask=other.mask, device=triton_device)
    rows = torch.cat([p.sequences()[i] for i in order])
    for one, two, moved in zip(packed, again, shuffled, strict=True):
        assert torch.equal(one, two) and torch.equal(one[rows], moved)
    for i in 0, 3:
        own = p.take([i])
        alone = launch(name, own.columns, own.cu, bootstrap=own.bootstrap, mask=own.mask, device=triton_device)
        assert all(torch.equal(a, x[p.sequences()[i]]) for a, x in zip(alone, packed, strict=True))


@every_scan
def test_masked_rows_are_never_read(name, triton_device):
    p = problem(name, [5, 9, 0, 40, 3])
    p.mask[-3:] = False
    poisoned = p.columns.where(p.mask, math.nan)
    whole = launch(name, p.columns, p.cu, bootstrap=p.bootstrap, mask=p.mask, device=triton_device)
    results = launch(name, poisoned, p.cu, bootstrap=p.bootstrap, mask=p.mask, device=triton_device)
    for before, after in zip(whole, results, strict=True):
        assert torch.equal(before, after) and not after[~p.mask].any()


@every_scan
@pytest.mark.parametrize("bad, decay", [(math.inf, 0.01), (-math.inf, 1.0), (math.nan, 0.0)])
def test_infinite_rewards_reach_what_a_loop_lets_them_reach(name, bad, decay, triton_device):
    """Also across groups of pieces, where a decay of 0.01 per row has long underflowed."""
    p = problem(name, [3, 140, 2])
    p.columns[0].nan_to_num_(posinf=0.5)
    p.columns[0, 137] = bad
    results = launch(name, p.columns, p.cu, **decays(name, decay), device=triton_device)
    for i, rows in enumerate(p.sequences()):
        for ours, want in zip(results, loop(name, p.columns[:, rows], None, decay), strict=True):
            got = ours[rows]
            assert ((got == want) | (got.isnan() & want.isnan()) | (got.isfinite() & want.isfinite())).all(), i


@every_scan
@pytest.mark.parametrize("bounds", [[0, 500], [-50, 90], [90, 10, 100], [1 << 40, 3], [0, 99], [0, 60, 40, 100], [0]])
def test_broken_boundaries(name, bounds, triton_device):
    """Rows around the tensors keep their sentinel, every result is NaN."""
    wide = torch.full((SCANS[name].num_columns, 300), 7.0, device=triton_device)
    results = launch(name, wide[:, 100:200], torch.tensor(bounds), device=triton_device)
    assert all(x.isnan().all() for x in results) and (wide == 7).all()


def test_no_rows(triton_device):
    x, cu = torch.zeros(0, device=triton_device), torch.zeros(3, dtype=torch.int32, device=triton_device)
    assert [len(r) for r in gae.launch(x, x, cu, 1.0, 0.95, None, None, None)] == [0, 0]


def test_offsets_beyond_int32(triton_device):
    """The search for a slot's sequence among boundaries past 2^31, as the setup launch runs it."""
    cu = torch.tensor([0, (1 << 32) + 5, (1 << 32) + 5, 1 << 34], device=triton_device)
    sizes = {"PIECE": 32, "GROUP": 64, "PIECES": 1 << 26, "GROUPS": 1 << 20, "BS": 8, "num_warps": 1}
    firsts, groups, broken = torch.full((3, 8), -1, dtype=torch.int64, device=triton_device)
    scan.scan_setup[(1,)](cu, firsts, groups, broken, 1 << 34, 3, 8, 8, 2, **sizes)
    # slots: sequence 0 from 0, the empty one from 1 + 2^27, the last from 2 + 2^27; of groups 2 + 2^21
    assert firsts.tolist() == [0, 0, 0, 2, 2, 2, 2, 2] and groups.tolist() == [0, 0, 0, 2, 2, 2, 2, 2]
    assert broken[0] == 0


@pytest.mark.parametrize("with_nvcc", [False, True])
def test_one_place_decides_which_serves(with_nvcc):
    """The package as a CUDA torch imports it, alone and beside an extension of nvcc's, one that lacks its kernels."""
    script = """
        import importlib.machinery, os, sys, types, torch
        os.environ["TRITON_INTERPRET"] = "0"
        torch.version.cuda = "13.0"
        if len(sys.argv) > 1:
            built = sys.modules["qrm_fast._cuda"] = types.ModuleType("qrm_fast._cuda")
            built.__spec__ = importlib.machinery.ModuleSpec("qrm_fast._cuda", None)
        import qrm_fast
        from qrm_fast import doctor
        for row in doctor.served():
            print(row.op, row.cuda)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), *(["with nvcc"] if with_nvcc else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if with_nvcc:
        lacking = ", ".join(f"{name} for CUDA" for name in (*sorted(SCANS), *hopper.SCHEMAS))
        assert f"they lack kernels of {lacking}; run" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    served = dict(line.split() for line in done.stdout.splitlines())
    assert served["token_q"] == "qrm_fast/triton/token_q.py"
    for name in SCANS:
        assert served[name] == f"qrm_fast/triton/{name}.py"


@pytest.mark.gpu
@every_scan
def test_captured_in_a_cuda_graph(name):
    """Nothing waits for the host: a replay over new columns gives their results."""
    p, q = problem(name, [5000, 3, 0, 700], seed=1), problem(name, [5000, 3, 0, 700], seed=2)
    columns, cu = p.columns.cuda(), p.cu.cuda()
    launch(name, columns, cu, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = scan.launch(name, tuple(columns), cu, None, None, 0.5, 0.5, 1.0, 1.0)
    columns.copy_(q.columns)
    graph.replay()
    direct = scan.launch(name, tuple(q.columns.cuda()), cu, None, None, 0.5, 0.5, 1.0, 1.0)
    assert all(map(torch.equal, captured, direct))
