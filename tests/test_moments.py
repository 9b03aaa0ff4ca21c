"""moments, the statistics that whitening and reward normalisation share, also over several processes."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from grids import LENGTHS, cu_seqlens

from qrm_fast import q_advantages, q_token_rewards, whiten
from qrm_fast.ops.moments import _moments, moments
from qrm_fast.triton import moments as triton_kernels


@pytest.fixture(params=["kernel", "reference", "triton"])
def op(request, triton_device):
    def by_triton(*tensors):
        return triton_kernels.launch(*(x if x is None else x.to(triton_device) for x in tensors)).cpu()

    return {"kernel": _moments, "reference": _moments.reference, "triton": by_triton}[request.param]


def test_hand_computed(op):
    x = torch.tensor([1.0, 3.0, 100.0, -2.0, 5.0])
    mask = torch.tensor([True, True, False, True, True])
    cu, groups = torch.tensor([0, 2, 3, 5]), torch.tensor([2, 0, 2])
    sequences = [[2.0, 2, 2], [0, 0, 0], [2, 1.5, 24.5]]
    assert op(x, mask, cu, None).tolist() == sequences
    assert op(x, mask, None, None).tolist() == [[4, 1.75, 26.75]]
    assert op(x, mask, cu, groups).tolist() == [[4, 1.75, 26.75], [0, 0, 0], [4, 1.75, 26.75]]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_agrees_with_exact_sums(lengths, op):
    """Far from zero, where a one-pass formula loses the spread."""
    lengths = lengths[:50]
    g = torch.Generator().manual_seed(3)
    x = torch.randn(sum(lengths), generator=g) + 4096
    mask = torch.rand(sum(lengths), generator=g) < 0.7
    x[mask & (torch.rand(sum(lengths), generator=g) < 0.05)] = math.nan
    cu = cu_seqlens(lengths)
    for sets, result in ((cu, op(x, mask, cu, None)), (torch.tensor([0, len(x)]), op(x, mask, None, None))):
        assert result.shape == (len(sets) - 1, 3)
        for (bos, eos), row in zip(itertools.pairwise(sets), result.tolist(), strict=True):
            rows = [v for v, keep in zip(x[bos:eos].tolist(), mask[bos:eos], strict=True) if keep and math.isfinite(v)]
            mean = math.fsum(rows) / max(len(rows), 1)
            spread = math.fsum((v - mean) ** 2 for v in rows)
            assert row == pytest.approx([len(rows), mean, spread], rel=1e-11, abs=1e-11)


def test_constant_has_no_spread():
    for dtype in torch.float32, torch.float64:
        assert moments(torch.full((5000,), 0.1, dtype=dtype))[0, 2] == 0


def test_triton_bits_depend_on_the_own_rows_only(triton_device):
    x = torch.randn(9000, device=triton_device)
    sets = triton_kernels.launch(x, None, cu_seqlens([7, 6000, 0, 2993]).to(triton_device), None)
    own = triton_kernels.launch(x[7:6007].clone(), None, cu_seqlens([6000]).to(triton_device), None)
    assert torch.equal(sets[1:2], own)


def test_triton_stays_inside_its_tensors(triton_device):
    wide = torch.full((30,), 7.0, device=triton_device)
    for boundaries in [-50, 5, 20], [0, 15, 5], [0, 10**9, 20], [20, 20, 20]:
        sets = triton_kernels.launch(wide[5:25], None, torch.tensor(boundaries, device=triton_device), None)
        assert set(sets[:, 1].tolist()) <= {0.0, 7.0} and not sets[:, 2].any()


def test_opcheck():
    x, mask, cu = torch.randn(9), torch.rand(9) < 0.5, cu_seqlens([2, 0, 7])
    for args in (x, None, None, None), (x.half(), mask, cu, None), (x, mask, cu, torch.tensor([1, 0, 1])):
        torch.library.opcheck(_moments.op, args)


def shares():
    """[T] scores over 3 sequences and a mask: rank 0 holds two sequences, rank 1 the third, all in one batch."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(3000, generator=g) * 2 + 5, cu_seqlens([700, 1, 2299]), torch.rand(3000, generator=g) < 0.8


def on_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    q, _, mask = shares()
    rows = slice(0, 701) if rank == 0 else slice(701, 3000)
    cu = cu_seqlens([700, 1] if rank == 0 else [2299])
    world = dist.group.WORLD
    torch.save(
        {
            "rewards": q_token_rewards(q[rows], cu, mask=mask[rows], center=True, process_group=world),
            "whitened": whiten(q[rows], mask=mask[rows], unbiased=True, process_group=world),
            "advantages": q_advantages(q[rows], q[rows].square(), cu, mask=mask[rows], process_group=world).advantages,
            "alone": q_token_rewards(q[rows], cu, mask=mask[rows], center=True),
            "stats": moments(q[rows], mask[rows], process_group=world),
            "one side empty": moments(q[rows], mask[rows] & bool(rank), process_group=world),
            "none": moments(q[rows], mask[rows] & False, process_group=world),
            "constant": moments(torch.full((3 + rank,), 0.1, dtype=torch.float64), process_group=world),
        },
        f"{folder}/rank{rank}.pt",
    )
    dist.destroy_process_group()


def test_a_process_group_sees_one_batch(tmp_path):
    mp.spawn(on_rank, args=(tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    q, cu, mask = shares()
    expected = q_token_rewards(q, cu, mask=mask, center=True)
    torch.testing.assert_close(torch.cat([first["rewards"], second["rewards"]]), expected, rtol=2e-7, atol=0)
    expected_whitened = whiten(q, mask=mask, unbiased=True)
    torch.testing.assert_close(torch.cat([first["whitened"], second["whitened"]]), expected_whitened, rtol=2e-7, atol=0)
    expected_advantages = q_advantages(q, q.square(), cu, mask=mask).advantages
    joined = torch.cat([first["advantages"], second["advantages"]])
    torch.testing.assert_close(joined, expected_advantages, rtol=2e-7, atol=0)
    assert not torch.allclose(first["alone"], expected[:701])
    for name in "stats", "one side empty", "none", "constant":
        assert torch.equal(first[name], second[name])
    torch.testing.assert_close(first["stats"], moments(q, mask), rtol=1e-12, atol=0)
    torch.testing.assert_close(first["one side empty"], moments(q[701:], mask[701:]), rtol=1e-12, atol=0)
    assert first["none"].tolist() == [[0, 0, 0]]
    assert first["constant"][0, 2] == 0
