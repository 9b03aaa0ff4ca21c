"""gae: hand-computed values, its definition as a double sum, and CUDA. test_scan.py has what all scans promise.

Two golden vectors of the released code that end in gae are in test_q_token_rewards.py.
"""

import itertools
import math

import pytest
import torch
from accuracy import assert_as_accurate
from grids import LENGTHS, cu_seqlens

from qrm_fast import gae
from qrm_fast.ops.gae import _gae


def oracle(rewards, values, cu, *, gamma=1.0, lam=0.95, bootstrap=None, mask=None):
    """The definition as a double sum: A_t = sum over k of (gamma lam)^k delta_(t+k), over the unmasked rows."""
    r, v = rewards.double().tolist(), values.double().tolist()
    advantages, returns = torch.zeros(2, len(r), dtype=torch.float64)
    for i, (bos, eos) in enumerate(itertools.pairwise(cu.tolist())):
        rows = [t for t in range(bos, eos) if mask is None or mask[t]]
        lam_i = lam if isinstance(lam, float) else lam[i].item()
        last = 0.0 if bootstrap is None else bootstrap[i].item()
        next_values = [*(v[t] for t in rows[1:]), last][: len(rows)]
        delta = [r[t] + gamma * nv - v[t] for t, nv in zip(rows, next_values, strict=True)]
        for k, t in enumerate(rows):
            advantages[t] = math.fsum((gamma * lam_i) ** j * d for j, d in enumerate(delta[k:]))
            returns[t] = advantages[t] + v[t]
    return advantages, returns


def inputs(lengths, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(len(lengths))
    acc = torch.promote_types(dtype, torch.float32)
    rewards, values = torch.randn(2, sum(lengths), generator=g).to(dtype)
    mask = torch.rand(sum(lengths), generator=g) < 0.6
    lam, bootstrap = torch.rand(2, len(lengths), generator=g).to(acc)
    return tuple(x.to(device) for x in (rewards, values, cu_seqlens(lengths), mask, lam, bootstrap))


CASES = {
    "default": lambda mask, lam, bootstrap: {},
    "discounted": lambda mask, lam, bootstrap: {"gamma": 0.9, "lam": 0.8},
    "one step": lambda mask, lam, bootstrap: {"gamma": 0.9, "lam": 0.0, "bootstrap": bootstrap},
    "masked": lambda mask, lam, bootstrap: {"gamma": 0.99, "mask": mask},
    "everything": lambda mask, lam, bootstrap: {"gamma": 0.97, "lam": lam, "bootstrap": bootstrap, "mask": mask},
}


def through_reference(rewards, values, cu, *, gamma=1.0, lam=0.95, bootstrap=None, mask=None):
    """PyTorch's own operators in the dtype of the result."""
    lam, per_sequence = (1.0, lam) if isinstance(lam, torch.Tensor) else (lam, None)
    return _gae.reference(rewards, values, cu, gamma, lam, per_sequence, bootstrap, mask)


@pytest.mark.parametrize("op", [_gae, _gae.reference], ids=["kernel", "reference"])
def test_hand_computed(op):
    rewards, values = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 1.0, 1.5])
    cu, bootstrap = torch.tensor([0, 3]), torch.tensor([2.0])
    # deltas 1, 1.75, 2.5 and A_t = delta_t + A_{t+1} / 4
    advantages, returns = op(rewards, values, cu, 0.5, 0.5, None, bootstrap, None)
    assert advantages.tolist() == [1.59375, 2.375, 2.5] and returns.tolist() == [2.09375, 3.375, 4.0]
    # the middle row is an observation: delta_0 = 1 + 1.5 / 2 - 0.5 sees the value and advantage of the last row
    mask = torch.tensor([True, False, True])
    advantages, returns = op(rewards, values, cu, 0.5, 0.5, None, bootstrap, mask)
    assert advantages.tolist() == [1.875, 0, 2.5] and returns.tolist() == [2.375, 0, 4.0]
    # without a bootstrap value the last delta is 1.5; lam 0 keeps the deltas, also when given per sequence
    zero = torch.tensor([0.0])
    advantages, _ = op(rewards, values, cu, 0.5, 1.0, zero, None, None)
    assert advantages.tolist() == [1, 1.75, 1.5]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_agrees_with_the_definition(lengths, case, device):
    rewards, values, cu, *rest = inputs(lengths, device=device)
    options = CASES[case](*rest)
    exact = oracle(rewards, values, cu, **options)
    peer = through_reference(rewards, values, cu, **options)
    for ours, ref, torchs in zip(gae(rewards, values, cu, **options), exact, peer, strict=True):
        assert_as_accurate(ours, ref, torchs, slack=1 if device == "cpu" else 4)  # CUDA joins rows in a tree of float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype, device):
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("no float64 on CUDA")
    rewards, values, cu, *rest = inputs([3, 1, 7, 63, 65], dtype, device)
    options = CASES["everything"](*rest)
    result = gae(rewards, values, cu, **options)
    assert {x.dtype for x in result} == {torch.promote_types(dtype, torch.float32)}
    peer = through_reference(rewards, values, cu, **options)
    for ours, ref, torchs in zip(result, oracle(rewards, values, cu, **options), peer, strict=True):
        # a tree of rows, where PyTorch goes one by one; on CPU all but float64 is carried wider
        assert_as_accurate(ours, ref, torchs, slack=4 if device == "cuda" else 2 if dtype == torch.float64 else 1)


def test_masked_rows_are_never_read(device):
    rewards, values, cu, mask, *_ = inputs([5, 9, 40, 3], device=device)
    results = []
    for poison in 0.0, math.nan, math.inf:
        result = gae(rewards.where(mask, poison), values.where(mask, poison), cu, mask=mask)
        results.append(torch.stack(result))
        assert not results[-1][:, ~mask].any()
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_fully_masked_sequences_are_empty(device):
    rewards, values, cu, mask, *_ = inputs([4, 6], device=device)
    mask[:4] = False
    advantages, returns = gae(rewards, values, cu, mask=mask, bootstrap=torch.ones(2, device=device))
    assert not advantages[:4].any() and not returns[:4].any() and advantages[4:].any()


def test_nan_stays_in_its_sequence(device):
    rewards, values, cu, *_ = inputs([4, 50, 6], device=device)
    rewards[40] = math.nan
    advantages, _ = gae(rewards, values, cu)
    assert torch.equal(advantages.isnan(), (torch.arange(60) >= 4).logical_and(torch.arange(60) <= 40).to(device))


@pytest.mark.gpu
@pytest.mark.unpoisoned
def test_cuda_bits_do_not_depend_on_the_packing():
    lengths = [1, 31, 32, 33, 0, 700, 64, 5000]
    arguments = inputs(lengths, device="cuda")
    rewards, values, cu, mask, lam, bootstrap = arguments
    packed = gae(rewards, values, cu, gamma=0.99, lam=lam, bootstrap=bootstrap, mask=mask)
    assert torch.equal(packed.advantages, gae(*arguments[:3], gamma=0.99, lam=lam, bootstrap=bootstrap, mask=mask)[0])
    for i, (bos, eos) in enumerate(itertools.pairwise(cu.tolist())):
        alone = gae(
            rewards[bos:eos],
            values[bos:eos],
            torch.tensor([0, eos - bos], device="cuda"),
            gamma=0.99,
            lam=lam[i : i + 1],
            bootstrap=bootstrap[i : i + 1],
            mask=mask[bos:eos],
        )
        assert torch.equal(alone.advantages, packed.advantages[bos:eos])
        assert torch.equal(alone.returns, packed.returns[bos:eos])


@pytest.mark.gpu
def test_cuda_stays_inside_its_tensors():
    """Boundaries that a CPU kernel would refuse: rows around the tensors keep their sentinel, every result is NaN."""
    wide = torch.full((3, 300), 7.0, device="cuda")
    for bounds in [0, 500], [-50, 90], [90, 10, 100], [1 << 40, 3]:
        cu = torch.tensor(bounds, device="cuda")
        advantages, returns = gae(wide[0, 100:200], wide[1, 100:200], cu)
        assert advantages.isnan().all() and returns.isnan().all()
    assert (wide == 7).all()


@pytest.mark.gpu
def test_cuda_refuses_float64():
    rewards, values, cu, *_ = inputs([3], device="cuda")
    with pytest.raises(TypeError, match="rewards must not be float64 on CUDA"):
        gae(rewards.double(), values.double(), cu)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_offset_slices_and_index_dtypes(dtype):
    rewards, values, cu, *_ = inputs([3, 2, 4])
    wide = torch.full((2, 30), math.nan)
    wide[0, 7:16], wide[1, 5:14] = rewards, values
    for ours, expected in zip(gae(wide[0, 7:16], wide[1, 5:14], cu.to(dtype)), gae(rewards, values, cu), strict=True):
        assert torch.equal(ours, expected)


def test_opcheck():
    rewards, values, cu, mask, lam, bootstrap = inputs([3, 0, 4, 6])
    torch.library.opcheck(_gae.op, (rewards, values, cu, 0.9, 1.0, lam, bootstrap, mask))
    torch.library.opcheck(_gae.op, (rewards.half(), values.half(), cu.long(), 0.9, 0.95, None, None, None))


def test_compiles_whole_and_for_any_length():
    compiled = torch.compile(gae, fullgraph=True, dynamic=True)
    for lengths in [3, 4, 9, 5], [8, 1, 6, 6, 70, 2], [1, 2]:
        rewards, values, cu, mask, lam, bootstrap = inputs(lengths)
        options = {"gamma": 0.9, "lam": lam, "bootstrap": bootstrap, "mask": mask}
        for graph, eager in zip(
            compiled(rewards, values, cu, **options), gae(rewards, values, cu, **options), strict=True
        ):
            assert torch.equal(graph, eager)


X = torch.zeros(4)
CU = torch.tensor([0, 2, 4])


@pytest.mark.parametrize(
    "error, message, options",
    [
        (ValueError, r"rewards must be \[T\] .* got \[2, 2\] float32", {"rewards": torch.zeros(2, 2)}),
        (TypeError, r"rewards must be \[T\] .* got \[4\] int64", {"rewards": torch.zeros(4, dtype=torch.int64)}),
        (TypeError, r"values must be \[T\] float32, got \[4\] bfloat16", {"values": X.bfloat16()}),
        (ValueError, r"values must be \[T\] float32 with T = 4, got \[3\] float32", {"values": X[:3]}),
        (ValueError, "values must be dense in its last dimension, got stride 2", {"values": torch.zeros(8)[::2]}),
        (ValueError, "values must be on cpu like the other arguments, got meta", {"values": X.to("meta")}),
        (TypeError, r"cu_seqlens must be \[S\+1\] int32 or int64, got \[3\] int16", {"cu_seqlens": CU.short()}),
        (ValueError, "cu_seqlens must start at 0, got 1", {"cu_seqlens": CU + 1}),
        (ValueError, "cu_seqlens must not decrease, got 4 then 2 at index 2", {"cu_seqlens": CU[[0, 2, 1]]}),
        (ValueError, "cu_seqlens must end at the number of packed rows, 4, got 2", {"cu_seqlens": CU[:2]}),
        (ValueError, r"lam must be \[S\] float32 with S = 2, got \[4\] float32", {"lam": X}),
        (TypeError, r"lam must be \[S\] float32, got \[2\] float64", {"lam": X[:2].double()}),
        (ValueError, r"bootstrap must be \[S\] float32 with S = 2, got \[1\] float32", {"bootstrap": X[:1]}),
        (TypeError, r"mask must be \[T\] bool, got \[4\] float32", {"mask": X}),
    ],
)
def test_bad_input(error, message, options):
    with pytest.raises(error, match=message):
        gae(**{"rewards": X, "values": X, "cu_seqlens": CU} | options)
