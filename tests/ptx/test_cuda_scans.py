"""The CUDA C++ scans, as nvcc compiles them for sm_90, under several schedules; without nvcc nothing is compiled."""

import math
import re
import shutil

import pytest
import torch
from scans import SCANS, Problem, decays, loop, problem

from ptx import cuda_launches
from ptx.emulator import Fault

LENGTHS = [5000, 3, 0, 1024, 1025, 1, 33, 2000, 16]  # units of 1024 rows
every_scan = pytest.mark.parametrize("name", SCANS)
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")


def launched(name: str, p: Problem, seed: int, *, gamma=1.0, lam=None, **options) -> tuple[torch.Tensor, ...]:
    """The results of an op's CUDA kernels; lam defaults as in the public functions."""
    columns, rest = [c.contiguous() for c in p.columns], (p.bootstrap, p.mask)
    lam = lam if lam is not None else 1.0 if name == "vtrace" else 0.95
    own = {
        "gae": (gamma, 1.0, lam) if isinstance(lam, torch.Tensor) else (gamma, lam, None),
        "discounted_returns": (gamma,),
        "min_gae": (lam,),
        "vtrace": (gamma, lam, 1.0, 1.0),
    }
    return cuda_launches.launched(name, seed, *columns, p.cu, *own[name], *rest, **options)


@every_scan
@pytest.mark.parametrize("decay", [0.0, 0.95, 1.0])
def test_as_the_cpu_kernel_in_float64(name, decay):
    """Rounding over some 20 steps of a tree of float32."""
    p = problem(name, LENGTHS)
    wide = {"mask": p.mask, "bootstrap": p.bootstrap.double()}
    exact = SCANS[name].op(p.columns.double(), p.cu, **wide, **decays(name, decay))
    for ours, want in zip(launched(name, p, seed=3, **decays(name, decay)), exact, strict=True):
        torch.testing.assert_close(ours.double(), want, rtol=1e-5, atol=1e-4 if decay < 1 else 1e-2)


@every_scan
@pytest.mark.unpoisoned
def test_bits_depend_neither_on_packing_nor_on_timing(name):
    p = problem(name, LENGTHS)
    packed = launched(name, p, seed=0)
    for seed in range(1, 6):
        assert all(map(torch.equal, packed, launched(name, p, seed)))
    order = list(range(len(LENGTHS)))[::-1]
    shuffled, rows = launched(name, p.take(order), seed=6), torch.cat([p.sequences()[i] for i in order])
    assert all(torch.equal(x[rows], y) for x, y in zip(packed, shuffled, strict=True))


@every_scan
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_and_boundaries_of_either_width(name, dtype):
    p = problem(name, [700, 0, 1500, 9], dtype)
    narrow = launched(name, p._replace(cu=p.cu.long()), seed=1)
    wide = launched(name, p._replace(columns=p.columns.float(), cu=p.cu.int()), seed=2)
    assert all(map(torch.equal, narrow, wide))


def test_lam_per_sequence():
    p, lam = problem("gae", [1100, 9, 0, 3]), torch.tensor([0.9, 0.0, 0.3, 1.0])
    packed = launched("gae", p, seed=1, gamma=0.9, lam=lam)
    for i, rows in enumerate(p.sequences()):
        alone = launched("gae", p.take([i]), seed=2, gamma=0.9, lam=lam[i].item())
        assert all(torch.equal(x[rows], y) for x, y in zip(packed, alone, strict=True))


@every_scan
def test_masked_rows_are_never_read(name):
    p = problem(name, [5, 9, 0, 1500, 3])
    p.mask[-3:] = False
    whole = launched(name, p, seed=1)
    poisoned = launched(name, p._replace(columns=p.columns.where(p.mask, math.nan)), seed=2)
    for before, after in zip(whole, poisoned, strict=True):
        assert torch.equal(before, after) and not after[~p.mask].any()


@every_scan
@pytest.mark.parametrize("bad, decay", [(math.inf, 0.01), (-math.inf, 1.0), (math.nan, 0.0)])
def test_infinite_rewards_reach_what_a_loop_lets_them_reach(name, bad, decay):
    """Also across units, where a decay of 0.01 per row has long underflowed; without a mask and a bootstrap."""
    p = problem(name, [3, 2500, 2])._replace(mask=None, bootstrap=None)
    p.columns[0].nan_to_num_(posinf=0.5)
    p.columns[0, 2450] = bad
    results = launched(name, p, seed=1, **decays(name, decay))
    for rows in p.sequences():
        for ours, want in zip(results, loop(name, p.columns[:, rows], None, decay), strict=True):
            got = ours[rows]
            assert ((got == want) | (got.isnan() & want.isnan()) | (got.isfinite() & want.isfinite())).all()


@every_scan
def test_broken_boundaries_give_nan_and_nothing_outside(name):
    p = problem(name, [1500])
    for bounds in [0, 5000], [-50, 1500], [900, 10, 1500], [1 << 40, 3], [0, 1499], [0, 60, 40, 1500], [0]:
        cu = torch.tensor(bounds)
        broken = p._replace(cu=cu, bootstrap=torch.zeros(len(bounds) - 1))
        assert all(x.isnan().all() for x in launched(name, broken, seed=4))


@every_scan
def test_no_rows_launch_nothing(name):
    """A grid of no blocks is an error."""
    cuda_launches.counts.clear()
    assert all(x.shape == (0,) for x in launched(name, problem(name, [0, 0]), seed=0))
    assert not cuda_launches.counts


MIXED = [1733, 40, 2934, 411, 1288, 2507, 96, 842, 2150, 1019, 5, 2661, 707, 1904, 1450, 2288, 333, 1180]
INSTRUCTIONS = {  # most that a thread executes per row: in sequences of 40 rows, of 256, in one of 16384, and mixed
    "gae": (62, 78, 66, 94),
    "discounted_returns": (46, 67, 54, 77),
    "min_gae": (66, 106, 98, 127),
    "vtrace": (87, 122, 121, 151),
}


@every_scan
def test_instructions_per_row(name):
    for lengths, most in zip((40, 256, 1 << 14, MIXED), INSTRUCTIONS[name], strict=True):
        assert cuda_launches.instructions_per_row(name, lengths) <= most


def mutated(pattern: str, replacement: str, count: int = 0):
    def mutation(text: str) -> str:
        return re.sub(pattern, replacement, text, count=count)

    return mutation


MUTANTS = {
    # the unit is taken from the front: it waits for units that take their tickets later
    "reversed tickets": (
        r"not\.b64\s+(%rd\d+), (%rd\d+);\s*add\.s64\s+(%rd\d+), \1, %rd\d+;",
        r"mov.u64 \3, \2;",
        "hang: all warps compute and read",
    ),
    "a plain store publishes": (r"st\.release\.gpu\.s32", "st.global.s32", "race in global memory"),
    "a plain load waits": (r"ld\.acquire\.gpu\.s32", "ld.global.s32", "race in global memory"),
    "nothing is waited for": (
        r"(ld\.acquire\.gpu\.s32\s+(%r\d+), .*;)",
        r"\1\nmov.u32 \2, 1;",
        "race in global memory",
    ),
    "no barriers": (r"bar\.sync\s+0;", "", "race in shared memory"),
    "rows from one too far": (r"(ld\.global\.u32\s+%r\d+, \[%rd\d+)\+512\]", r"\1+4194304]", "outside every tensor"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant):
    *change, complaint = MUTANTS[mutant]
    p = problem("gae", [12_000, 3])  # more units than are in flight
    with pytest.raises(Fault, match=complaint):
        for seed in range(8):
            launched("gae", p, seed, mutation=mutated(*change))


def test_single_barriers_are_missed():
    """Those of pieces and units; groups of units have theirs in longer sequences."""
    p, places = problem("gae", [3000, 3, 300, 40]), []

    def without(text: str, k: int) -> str:
        if "UnitScan" not in text:
            return text
        places[:] = [match.span() for match in re.finditer(r"bar\.sync\s+0;", text)]
        begin, end = places[k]
        return text[:begin] + text[end:]

    caught, k = set(), 0
    while k == 0 or k < len(places):
        try:
            for seed in range(3):
                launched("gae", p, seed, mutation=lambda text, k=k: without(text, k))
        except Fault:
            caught.add(k)
        k += 1
    assert len(caught) >= 4, f"of {k} barriers only those at {caught} are missed"
