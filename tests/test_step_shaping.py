"""clip_delta, implicit_rewards, progress_rewards: literal values, definitions in float64, and the promises of ops."""

import itertools
import math

import pytest
import torch
from accuracy import assert_as_accurate
from cuda_graph import replayed
from grids import LENGTHS, cu_seqlens

from qrm_fast import clip_delta, implicit_rewards, progress_rewards
from qrm_fast.ops.clip_delta import _clip_delta
from qrm_fast.ops.implicit_rewards import _implicit_rewards
from qrm_fast.ops.progress_rewards import _progress_rewards

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
CU = torch.tensor([0, 4, 4, 5, 7])


def test_clip_delta_by_hand():
    rewards = torch.tensor([0.5, -1.0, 2.0, -3.0, 0.25, -0.5, 1.0])
    assert clip_delta(rewards, CU, delta=False).tolist() == [0, -1, 0, -3, 0, -0.5, 0]
    assert clip_delta(rewards, CU, eta=0.75, delta=False).tolist() == [-0.25, -1.75, 0, -3.75, -0.5, -1.25, 0]
    assert clip_delta(rewards, CU, clip=False).tolist() == [1.5, -3, 2, 0, 0, -0.5, 0]
    assert clip_delta(rewards, CU).tolist() == [1, -1, 0, 0, 0, -0.5, 0]
    assert clip_delta(rewards, CU, clip=False, delta=False).tolist() == rewards.tolist()


def test_delta_bounds_the_return_by_a_single_score():
    """What is left from any step on is that step's score: the last step's own score is in nobody's return."""
    rewards = torch.randn(30, dtype=torch.float64)
    shaped = clip_delta(rewards, torch.tensor([0, 30]), clip=False)
    returns = shaped.flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(returns[:-1], rewards[:-1])
    assert returns[-1] == 0


def test_implicit_rewards_by_hand():
    assert implicit_rewards(torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -1.0]), beta=0.5).tolist() == [1, -0.5]
    torch.testing.assert_close(implicit_rewards(torch.tensor([1.0]), torch.tensor([0.0])), torch.tensor([0.05]))


def test_progress_rewards_by_hand():
    after, start = torch.tensor([0.5, 0.25, 1.0, 1.0, 0.0, 0.5, 0.75]), torch.tensor([0.25, 9.0, 0.5, 0.0])
    expected = [0.25, -0.25, 0.75, 0, -0.5, 0.5, 0.25]
    assert progress_rewards(after, start, CU).tolist() == expected
    assert progress_rewards(after, start, CU, alpha=4.0).tolist() == [4 * x for x in expected]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_agree_with_float64(lengths, dtype):
    g = torch.Generator().manual_seed(len(lengths))
    x, y = torch.randn(2, sum(lengths), generator=g).to(dtype)
    start, cu = torch.randn(len(lengths), generator=g).to(dtype), cu_seqlens(lengths)
    acc = torch.promote_types(dtype, torch.float32)

    def shaped(r, start):
        clipped, progress = torch.zeros_like(r), torch.zeros_like(r)
        for i, (bos, eos) in enumerate(itertools.pairwise(cu.tolist())):
            c = (r[bos:eos] - 0.125).clamp(max=0)
            clipped[bos:eos] = torch.cat([c[:-2] - c[1:-1], c[-2:-1], c[-1:] * 0])
            progress[bos:eos] = 0.3 * (r[bos:eos] - torch.cat([start[i : i + 1], r[bos : eos - 1]])[: eos - bos])
        return clipped, progress

    results = clip_delta(x, cu, eta=0.125), progress_rewards(x, start, cu, alpha=0.3)
    for ours, exact, peer in zip(
        results, shaped(x.double(), start.double()), shaped(x.to(acc), start.to(acc)), strict=True
    ):
        assert_as_accurate(ours, exact, peer)
    assert_as_accurate(implicit_rewards(x, y), 0.05 * (x.double() - y.double()), 0.05 * (x.to(acc) - y.to(acc)))


def test_what_is_not_finite_stays_where_it_is():
    rewards = torch.tensor([0.5, math.nan, -1.0, -3.0, math.nan, -math.inf, 1.0])
    assert clip_delta(rewards, CU).isnan().tolist() == [True, True, False, False, False, False, False]
    assert clip_delta(rewards, CU)[5] == -math.inf
    progress = progress_rewards(rewards.clamp(min=-5), torch.zeros(4), CU)
    assert progress.isnan().tolist() == [False, True, True, False, True, False, False]


def test_log_ratios_that_are_not_finite_stay_in_their_rows():
    result = implicit_rewards(
        torch.tensor([math.nan, math.inf, -math.inf, -math.inf, 1.0]), torch.tensor([0.0, 0, 0, -math.inf, -1])
    )
    expected = torch.tensor([math.nan, math.inf, -math.inf, math.nan, 0.1])
    torch.testing.assert_close(result, expected, equal_nan=True)


@pytest.mark.unpoisoned
def test_bits_depend_on_the_own_sequence_only():
    lengths = [1 + i * 37 % 50 for i in range(600)]
    x, start, cu = torch.randn(sum(lengths)), torch.randn(600), cu_seqlens(lengths)
    whole = clip_delta(x, cu), progress_rewards(x, start, cu)
    bos, eos = int(cu[7]), int(cu[8])
    alone = torch.tensor([0, eos - bos])
    assert torch.equal(clip_delta(x[bos:eos], alone), whole[0][bos:eos])
    assert torch.equal(progress_rewards(x[bos:eos], start[7:8], alone), whole[1][bos:eos])
    assert torch.equal(implicit_rewards(x[3:50], x[53:100]), implicit_rewards(x[:-50], x[50:])[3:50])


@pytest.mark.gpu
@pytest.mark.unpoisoned
def test_nothing_waits_and_a_graph_captures_it():
    lengths = [1 + i * 37 % 50 for i in range(600)]
    x, start, cu = torch.randn(sum(lengths)), torch.randn(600), cu_seqlens(lengths)

    def step(x, start, cu):
        return clip_delta(x, cu), progress_rewards(x, start, cu), implicit_rewards(x, x.flip(0), beta=0.5)

    arguments = x.cuda(), start.cuda(), cu.cuda()
    step(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    direct = step(*arguments)
    torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, replayed(lambda: step(*arguments)), direct))
    for ours, want in zip(direct, step(x, start, cu), strict=True):
        torch.testing.assert_close(ours.cpu(), want)


def test_not_differentiable():
    leaf = torch.zeros(7, requires_grad=True)
    for result in clip_delta(leaf, CU), implicit_rewards(leaf, leaf), progress_rewards(leaf, leaf[:4], CU):
        with pytest.raises(RuntimeError, match="is not differentiable"):
            result.sum().backward()


def test_opcheck():
    x = torch.randn(7)
    torch.library.opcheck(_clip_delta.op, (x, CU, 0.5, True, True))
    torch.library.opcheck(_clip_delta.op, (x, CU.int(), 0.5, False, False))
    torch.library.opcheck(_implicit_rewards.op, (x.half(), x.half(), 0.1))
    torch.library.opcheck(_progress_rewards.op, (x, x[:4], CU, 0.1))


def test_compile_whole_and_for_any_length():
    def all_three(x, start, cu):
        return clip_delta(x, cu), implicit_rewards(x, x + 1), progress_rewards(x, start, cu)

    compiled = torch.compile(all_three, fullgraph=True, dynamic=True)
    for lengths in [3, 4, 9], [8, 1, 6, 6, 70]:
        arguments = torch.randn(sum(lengths)), torch.randn(len(lengths)), cu_seqlens(lengths)
        for graph, eager in zip(compiled(*arguments), all_three(*arguments), strict=True):
            assert torch.equal(graph, eager)


X = torch.zeros(7)


@pytest.mark.parametrize(
    "op, error, message, arguments",
    [
        (clip_delta, TypeError, r"step_rewards must be \[K\] .* got \[7\] int64", (X.long(), CU)),
        (clip_delta, ValueError, "step_cu must end at the number of packed rows, 6, got 7", (X[:6], CU)),
        (clip_delta, ValueError, "step_cu must start at 0, got 1", (X, CU + 1)),
        (implicit_rewards, TypeError, r"ref_logprobs must be \[T\] float32, got \[7\] float16", (X, X.half())),
        (implicit_rewards, ValueError, r"ref_logprobs must be \[T\] .* with T = 7, got \[6\]", (X, X[:6])),
        (progress_rewards, ValueError, r"step_cu must be \[S\+1\] .* with S\+1 = 4, got \[5\]", (X, X[:3], CU)),
        (progress_rewards, TypeError, r"start_values must be \[S\] float32, got \[4\] int64", (X, X[:4].long(), CU)),
    ],
)
def test_bad_input(op, error, message, arguments):
    with pytest.raises(error, match=message):
        op(*arguments)
