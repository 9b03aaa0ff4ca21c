"""group_advantages: the published formulas, odd groups, rewards that are not finite."""

import math
import statistics

import pytest
import torch
from accuracy import assert_as_accurate

from qrm_fast import group_advantages
from qrm_fast.ops.group_advantages import KINDS, _group_advantages

IMPLEMENTATIONS = pytest.mark.parametrize(
    "op", [_group_advantages, _group_advantages._init_fn], ids=["kernel", "reference"]
)


def oracle(rewards, group_ids, kind, eps=1e-6):
    """Sequence by sequence with Python's statistics, in float64."""
    rewards, group_ids = rewards.double().tolist(), group_ids.tolist()
    out = []
    for i, reward in enumerate(rewards):
        group = [j for j, g in enumerate(group_ids) if g == group_ids[i] and math.isfinite(rewards[j])]
        others = [rewards[j] for j in group if j != i]
        if not math.isfinite(reward):
            out.append(math.nan)
        elif not others:
            out.append(reward)
        elif kind == "rloo":
            out.append(reward - statistics.fmean(others))
        else:
            members = [*others, reward]
            out.append((reward - statistics.fmean(members)) / (statistics.stdev(members) + eps))
    return torch.tensor(out, dtype=torch.float64)


def float32_path(rewards, group_ids, kind, eps=1e-6):
    """What one would write with PyTorch's own operators, in the dtype of the result."""
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32)).cpu()
    out = torch.empty_like(rewards)
    for i, g in enumerate(group_ids.tolist()):
        members = rewards[group_ids.cpu() == g]
        n = len(members)
        if n == 1:
            out[i] = rewards[i]
        elif kind == "rloo":
            out[i] = rewards[i] - (members.sum() - rewards[i]) / (n - 1)
        else:
            out[i] = (rewards[i] - members.mean()) / (members.std() + eps)
    return out


def inputs(num_sequences, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(num_sequences)
    rewards = torch.randn(num_sequences, generator=g).mul(2).add(5).to(dtype)
    # unequal groups in any order, singletons and unused ids among them
    group_ids = (torch.rand(num_sequences, generator=g).square() * num_sequences).long()
    return rewards.to(device), group_ids.to(device)


@IMPLEMENTATIONS
def test_hand_computed(op):
    rewards = torch.tensor([1.0, 7.0, 0.0, 5.0, 2.0, 3.0])
    group_ids = torch.tensor([4, 0, 4, 2, 4, 2])
    assert op(rewards, group_ids, "rloo", 1e-6).tolist() == [0, 7, -1.5, 2, 1.5, -2]
    root = math.sqrt(2)
    expected = torch.tensor([0, 7, -1, 1 / root, 1, -1 / root])
    torch.testing.assert_close(op(rewards, group_ids, "grpo", 0.0), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_sequences", [0, 1, 2, 33, 257])
def test_agrees_with_the_definition(num_sequences, kind, device):
    rewards, group_ids = inputs(num_sequences, device=device)
    exact, peer = oracle(rewards, group_ids, kind), float32_path(rewards, group_ids, kind)
    assert_as_accurate(group_advantages(rewards, group_ids, kind=kind), exact, peer)
    assert_as_accurate(_group_advantages._init_fn(rewards, group_ids, kind, 1e-6), exact, peer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype, kind):
    rewards, group_ids = inputs(50, dtype)
    result = group_advantages(rewards, group_ids, kind=kind)
    assert result.dtype == torch.promote_types(dtype, torch.float32)
    assert_as_accurate(result, oracle(rewards, group_ids, kind), float32_path(rewards, group_ids, kind))


@IMPLEMENTATIONS
@pytest.mark.parametrize("kind", KINDS)
def test_rewards_that_are_not_finite_stay_alone(kind, op):
    rewards, group_ids = inputs(40)
    rewards[3], rewards[9], rewards[20] = math.nan, math.inf, -math.inf
    finite = rewards.isfinite()
    result = op(rewards, group_ids, kind, 1e-6)
    assert torch.equal(result.isnan(), ~finite)
    assert_as_accurate(result[finite], oracle(rewards, group_ids, kind)[finite], result[finite])


@pytest.mark.parametrize("kind", KINDS)
def test_ids_out_of_range_give_nan_where_nothing_can_be_raised(kind):
    """The reference serves CUDA, where a kernel cannot raise."""
    rewards, group_ids = torch.tensor([1.0, 2, 3, 5]), torch.tensor([0, 4, 0, -1])
    expected = group_advantages(rewards[::2].contiguous(), torch.tensor([0, 0]), kind=kind)
    result = _group_advantages._init_fn(rewards, group_ids, kind, 1e-6)
    assert result[[1, 3]].isnan().all() and torch.equal(result[[0, 2]], expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_have_no_advantage(dtype, kind, device):
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("no float64 on CUDA")
    rewards = torch.full((7,), 0.1, dtype=dtype, device=device)
    assert not group_advantages(rewards, torch.zeros_like(rewards, dtype=torch.int32), kind=kind, eps=0.0).any()


@pytest.mark.unpoisoned
def test_groups_do_not_see_each_other():
    rewards, group_ids = inputs(60)
    result = group_advantages(rewards, group_ids, kind="grpo")
    for g in group_ids.unique():
        members = rewards[group_ids == g]
        alone = group_advantages(members, torch.zeros(len(members), dtype=torch.int64), kind="grpo")
        assert torch.equal(alone, result[group_ids == g])


def test_not_differentiable():
    rewards, group_ids = inputs(4)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        group_advantages(rewards.requires_grad_(), group_ids).sum().backward()


def test_opcheck():
    for kind in KINDS:
        torch.library.opcheck(_group_advantages, (*inputs(9), kind, 1e-6))
    torch.library.opcheck(_group_advantages, (*inputs(0, torch.bfloat16), "rloo", 1e-6))


def test_compiles_whole_and_for_any_length():
    compiled = torch.compile(group_advantages, fullgraph=True, dynamic=True)
    for num_sequences in 8, 33, 2:
        rewards, group_ids = inputs(num_sequences)
        assert torch.equal(compiled(rewards, group_ids, kind="grpo"), group_advantages(rewards, group_ids, kind="grpo"))


IDS = torch.tensor([0, 1, 1])


@pytest.mark.parametrize(
    "error, message, options",
    [
        (TypeError, r"rewards must be \[S\] .* got \[3\] int64", {"rewards": IDS}),
        (ValueError, r"rewards must be \[S\] .* got \[3, 1\] float32", {"rewards": torch.zeros(3, 1)}),
        (TypeError, r"group_ids must be \[S\] int32 or int64, got \[3\] float32", {"group_ids": IDS.float()}),
        (ValueError, r"group_ids must be \[S\] int32 or int64 with S = 3, got \[2\] int64", {"group_ids": IDS[:2]}),
        (ValueError, r"group_ids must lie in \[0, 3\), got 3 at index 2", {"group_ids": torch.tensor([0, 1, 3])}),
        (ValueError, r"group_ids must lie in \[0, 3\), got -1 at index 0", {"group_ids": IDS.int() - 1}),
        (ValueError, "kind must be one of rloo, grpo, got 'dr_grpo'", {"kind": "dr_grpo"}),
        (ValueError, "eps must be >= 0, got nan", {"eps": math.nan}),
    ],
)
def test_bad_input(error, message, options):
    with pytest.raises(error, match=message):
        group_advantages(**{"rewards": torch.zeros(3), "group_ids": IDS} | options)
