"""informative_groups: hand-worked groups, rewards that are not finite, and the promises of every op."""

import math

import pytest
import torch
from cuda_graph import replayed

from qrm_fast import group_advantages, informative_groups
from qrm_fast.ops.informative_groups import _informative_groups
from qrm_fast.triton import groups as triton_groups
from qrm_fast.triton import informative_groups as triton_kernels

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")  # interpreter


@pytest.fixture(params=["kernel", "reference", "compared", "sorted"])
def op(request, triton_device, monkeypatch):
    """The CPU kernel, the reference, and the Triton kernel in both ways of finding a group, with small blocks."""
    monkeypatch.setitem(triton_kernels.LAUNCH, "BS", 4)
    if request.param == "sorted":
        monkeypatch.setattr(triton_groups, "COMPARED", 0)

    def by_triton(rewards, group_ids):
        return triton_kernels.launch(rewards.to(triton_device), group_ids.to(triton_device)).cpu()

    return {"kernel": _informative_groups, "reference": _informative_groups.reference}.get(request.param, by_triton)


def test_hand_worked(op):
    rewards = torch.tensor([1, 0, 1, 1, 0.1, 0.1, 5, math.nan, 2, 2, math.inf, 3, 2])
    group_ids = torch.tensor([4, 4, 2, 2, 0, 0, 7, 3, 3, 3, 9, 9, 4])
    expected = [True, True] + [False] * 10 + [True]
    assert op(rewards, group_ids).tolist() == expected
    rewards[9] = 2.5
    assert op(rewards, group_ids).tolist() == [*expected[:8], True, True, *expected[10:]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("num_sequences", [0, 1, 64, 257])
def test_where_rloo_leaves_an_advantage(num_sequences, dtype, device):
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("no float64 on CUDA")
    g = torch.Generator().manual_seed(num_sequences)
    rewards = (torch.rand(num_sequences, generator=g) < 0.3).to(dtype)
    group_ids = torch.arange(num_sequences) // 4
    advantages = group_advantages(rewards, group_ids, kind="dr_grpo").abs()
    of_group = [bool(advantages[group_ids == i].any()) for i in group_ids]
    assert informative_groups(rewards.to(device), group_ids.int().to(device)).tolist() == of_group
    assert _informative_groups.reference(rewards, group_ids).tolist() == of_group


@pytest.mark.parametrize("op", ["reference", "compared", "sorted"], indirect=True)
def test_ids_out_of_range_are_not_informative_where_nothing_can_be_raised(op):
    mask = op(torch.tensor([1.0, 2, 3, 5]), torch.tensor([0, 1 << 40, 0, -1]))
    assert mask.tolist() == [True, False, True, False]


@pytest.mark.parametrize("op", ["compared", "sorted"], indirect=True)
def test_triton_as_the_cpu_kernel(op):
    g = torch.Generator().manual_seed(0)
    for num_sequences, dtype in (0, torch.half), (1, torch.bfloat16), (33, torch.float32):
        rewards = torch.rand(num_sequences, generator=g).round().to(dtype)
        group_ids = torch.randint(max(num_sequences // 3, 1), (num_sequences,), generator=g).int()
        assert torch.equal(op(rewards, group_ids), _informative_groups(rewards, group_ids))


@pytest.mark.gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("num_sequences", [700, 9000], ids=["compared", "sorted"])
def test_nothing_waits_and_a_graph_captures_it(num_sequences):
    rewards = torch.rand(num_sequences, generator=torch.Generator().manual_seed(0)).round()
    group_ids = torch.arange(num_sequences).flip(0) // 4
    arguments = rewards.cuda(), group_ids.cuda()
    informative_groups(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    direct = informative_groups(*arguments)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(direct.cpu(), informative_groups(rewards, group_ids))
    assert torch.equal(replayed(lambda: informative_groups(*arguments)), direct)


def test_opcheck():
    torch.library.opcheck(_informative_groups.op, (torch.rand(5), torch.tensor([0, 1, 1, 0, 2])))


def test_compiles_whole_and_for_any_length():
    compiled = torch.compile(informative_groups, fullgraph=True, dynamic=True)
    for num_sequences in 8, 33:
        rewards, group_ids = torch.rand(num_sequences).round(), torch.arange(num_sequences) // 2
        assert torch.equal(compiled(rewards, group_ids), informative_groups(rewards, group_ids))


@pytest.mark.parametrize(
    "error, message, rewards, group_ids",
    [
        (TypeError, r"rewards must be \[S\] .* got \[2\] int64", torch.tensor([1, 0]), torch.zeros(2).long()),
        (ValueError, r"group_ids must be \[S\] .* with S = 2, got \[1\] int64", torch.zeros(2), torch.zeros(1).long()),
        (ValueError, r"group_ids must lie in \[0, 2\), got 2 at index 1", torch.zeros(2), torch.tensor([0, 2])),
    ],
)
def test_bad_input(error, message, rewards, group_ids):
    with pytest.raises(error, match=message):
        informative_groups(rewards, group_ids)
