"""Mutants of the Triton kernels' own PTX, each caught for what it is: `EMULATED=90 pytest tests/ptx/mutants.py`.

Not collected by name: only a process that emulates (tests/conftest.py) can run it.
"""

import re

import pytest
import torch
from grids import cu_seqlens

from ptx import triton_launches
from ptx.emulator import Fault
from qrm_fast.triton import product, q_head_advantages, token_q

HOPPER = pytest.mark.skipif(triton_launches.state["capability"] < 90, reason="no copy engine and no products of groups")
AMPERE = pytest.mark.skipif(triton_launches.state["capability"] >= 90, reason="products wait for copies by threads")


@pytest.fixture
def mutate(monkeypatch, triton_device):
    """Changes the PTX of what is compiled from here on."""

    def mutate(pattern: str, replacement: str) -> None:
        compile_ = triton_launches.to_ptx

        def changed(launch):
            text, *rest = compile_(launch)
            mutant, count = re.subn(pattern, replacement, text)
            assert count, f"no {pattern} in {launch.kernel.__name__}"
            return mutant, *rest

        monkeypatch.setattr(triton_launches, "to_ptx", changed)
        monkeypatch.setattr(triton_launches, "machines", {})

    return mutate


def multiplied(num_rows=150, depth=320, num_columns=264, transposed=False, seeds=range(6)) -> None:
    """A product of bfloat16 matrices by descriptors where there are such, under several schedules."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(*((depth, num_rows) if transposed else (num_rows, depth)), generator=g).bfloat16()
    b = torch.randn(depth, num_columns, generator=g).bfloat16()
    want = (a.T if transposed else a).double() @ b.double()
    for seed in seeds:
        triton_launches.state["seed"] = 1000 * seed
        out = torch.full((num_rows, num_columns), torch.nan)
        product.multiply(a, b, out, torch.tensor(1.0), added=False, transposed=transposed)
        torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-3)


@pytest.mark.parametrize("transposed", [False, True])
def test_products_are_right(transposed, triton_device):
    multiplied(transposed=transposed)


@HOPPER
def test_a_product_is_waited_for(mutate):
    mutate(r"wgmma\.wait_group\.sync\.aligned \d+;", "wgmma.wait_group.sync.aligned 7;")
    with pytest.raises(Fault, match=r"touches an accumulator|still being read|ends before its products"):
        multiplied()


@HOPPER
def test_a_copy_is_waited_for(mutate):
    mutate(r"@!complete bra\.uni waitLoop;", "")
    with pytest.raises(Fault, match="copy in flight"):
        multiplied()


@HOPPER
def test_copies_bring_as_many_bytes_as_are_expected(mutate):
    mutate(r"(mbarrier\.arrive\.expect_tx\.shared\.b64 _, \[%r\d+\]), \d+;", r"\1, 65536;")
    with pytest.raises(Fault, match="hang: all warps compute and read"):
        multiplied(seeds=range(1))


@AMPERE
def test_copies_by_threads_are_waited_for(mutate):
    mutate(r"cp\.async\.wait_group\s+\d+;", "cp.async.wait_group 9;")
    with pytest.raises(Fault, match="copy in flight"):
        multiplied()


def test_barriers_between_copies_and_products(mutate):
    mutate(r"bar\.sync\s+0;", "")
    with pytest.raises(Fault):
        multiplied()


def pooled() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(400, 64, generator=g), torch.randn(64, generator=g)
    for seed in range(6):
        triton_launches.state["seed"] = 1000 * seed
        q_head_advantages.launch(hidden, head, cu_seqlens([300, 100]), None, True, True, 0.0, 1e-8)


def test_the_last_program_of_a_sequence_acquires_what_the_others_wrote(mutate):
    pooled()
    mutate(r"atom\.global\.gpu\.acq_rel\.add", "atom.global.gpu.relaxed.add")
    with pytest.raises(Fault, match="race in global memory: read of what another block wrote"):
        pooled()


def test_all_warps_have_written_when_a_program_arrives(mutate):
    mutate(r"bar\.sync\s+0;(?=(?s:(?!bar\.sync).)*atom\.global)", "")
    with pytest.raises(Fault, match="race in"):
        pooled()


@pytest.mark.parametrize(
    "change, complaint",
    [
        ((r"(st\.global\.b32 \[ %rd\d+) \+ 0 \]", r"\1 + 1048576 ]"), "outside every tensor"),
        ((r"(st\.global\.b32 \[ %rd\d+) \+ 0 \]", r"\1 + 2 ]"), "misaligned access of 4 bytes|outside every tensor"),
    ],
)
def test_stores_stay_inside(mutate, change, complaint):
    mutate(*change)
    with pytest.raises(Fault, match=complaint):
        token_q.forward(torch.randn(40, 64), torch.randn(64), None, None, None, 1e-6)
