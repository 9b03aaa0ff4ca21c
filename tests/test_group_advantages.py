"""group_advantages: the published formulas, odd groups, rewards that are not finite."""

import math
import statistics

import pytest
import torch
from accuracy import assert_as_accurate
from cuda_graph import replayed

from qrm_fast import group_advantages
from qrm_fast.ops.group_advantages import KINDS, _group_advantages
from qrm_fast.triton import group_advantages as triton_kernels
from qrm_fast.triton import groups

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")  # interpreter


@pytest.fixture(params=["kernel", "reference", "compared", "sorted"])
def op(request, triton_device, monkeypatch):
    """The CPU kernel, the reference, and the Triton kernel in both ways of finding a group, with small blocks."""
    monkeypatch.setitem(groups.LAUNCH, "BS", 16)
    if request.param == "sorted":
        monkeypatch.setattr(groups, "COMPARED", 0)

    def by_triton(*arguments):
        moved = (x.to(triton_device) if isinstance(x, torch.Tensor) else x for x in arguments)
        return triton_kernels.launch(*moved).cpu()

    return {"kernel": _group_advantages, "reference": _group_advantages.reference}.get(request.param, by_triton)


def extras(kind, rewards):
    """The tensors that a kind asks for; a length in seven is 0."""
    g = torch.Generator().manual_seed(len(rewards) + 1)
    lengths = torch.randint(7, (len(rewards),), generator=g).to(rewards.device)
    baseline = torch.randn(len(rewards), generator=g).to(rewards)
    return {"lengths": lengths} if kind == "opo" else {"baseline": baseline} if kind == "remax" else {}


def run(op, rewards, group_ids, kind, eps=1e-6):
    options = extras(kind, rewards)
    return op(rewards, group_ids, options.get("lengths"), options.get("baseline"), kind, eps)


def oracle(rewards, group_ids, kind, eps=1e-6):
    """Sequence by sequence with Python's statistics, in float64."""
    options = {name: x.tolist() for name, x in extras(kind, rewards).items()}
    rewards, group_ids = rewards.double().tolist(), group_ids.tolist()
    out = []
    for i, reward in enumerate(rewards):
        group = [j for j, g in enumerate(group_ids) if g == group_ids[i] and math.isfinite(rewards[j])]
        members, others = [rewards[j] for j in group], [rewards[j] for j in group if j != i]
        if not math.isfinite(reward):
            out.append(math.nan)
        elif kind == "remax":
            out.append(reward - options["baseline"][i])
        elif kind == "opo":
            tokens = sum(options["lengths"][j] for j in group)
            weighted = math.fsum(options["lengths"][j] * (rewards[j] - reward) for j in group)
            out.append(-weighted / tokens if tokens else reward - statistics.fmean(members))
        elif kind == "pass_at_k":
            best = group[members.index(max(members))]
            lead = reward - max(others, default=reward)
            out.append(lead / (statistics.stdev(members) + eps) if i == best and lead else 0.0)
        elif kind in ("dr_grpo", "reinforce_pp_baseline"):
            out.append(reward - statistics.fmean(members))
        elif not others:
            out.append(reward)
        elif kind == "rloo":
            out.append(reward - statistics.fmean(others))
        else:
            out.append((reward - statistics.fmean(members)) / (statistics.stdev(members) + eps))
    return torch.tensor(out, dtype=torch.float64)


def float32_path(rewards, group_ids, kind, eps=1e-6):
    """What one would write with PyTorch's own operators, in the dtype of the result."""
    options = {name: x.cpu() for name, x in extras(kind, rewards).items()}
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32)).cpu()
    out = torch.empty_like(rewards)
    for i, g in enumerate(group_ids.tolist()):
        mine = group_ids.cpu() == g
        members = rewards[mine]
        n = len(members)
        if kind == "remax":
            out[i] = rewards[i] - options["baseline"][i]
        elif kind == "opo":
            lengths = options["lengths"][mine]
            out[i] = (
                rewards[i] - (lengths * members).sum() / lengths.sum() if lengths.any() else rewards[i] - members[0]
            )
        elif kind == "pass_at_k":
            first, second = members.topk(2).values if n > 1 else members.expand(2)
            best = n > 1 and rewards[i] == first and first > second
            out[i] = (first - second) / (members.std() + eps) if best else 0.0
        elif kind in ("dr_grpo", "reinforce_pp_baseline"):
            out[i] = rewards[i] - members.mean()
        elif n == 1:
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


def test_hand_computed(op):
    rewards = torch.tensor([1.0, 7.0, 0.0, 5.0, 2.0, 3.0])
    group_ids = torch.tensor([4, 0, 4, 2, 4, 2])
    lengths, greedy = torch.tensor([1, 5, 2, 3, 2, 1]), torch.tensor([0.5, 7, 1, 1, -1, 3])
    root = math.sqrt(2)
    for kind, expected in {
        "rloo": [0, 7, -1.5, 2, 1.5, -2],
        "grpo": [0, 7, -1, 1 / root, 1, -1 / root],
        "dr_grpo": [0, 0, -1, 1, 1, -1],
        "opo": [0, 0, -1, 0.5, 1, -1.5],
        "reinforce_pp_baseline": [0, 0, -1, 1, 1, -1],
        "pass_at_k": [0, 0, 0, root, 1, 0],
        "remax": [0.5, 0, -1, 4, 3, 0],
    }.items():
        result = op(
            rewards, group_ids, lengths if kind == "opo" else None, greedy if kind == "remax" else None, kind, 0.0
        )
        torch.testing.assert_close(result, torch.tensor(expected, dtype=result.dtype))


def test_only_the_first_of_the_best_could_lead_and_a_tie_has_no_lead(op):
    rewards, one_group = torch.tensor([1.0, 3.0, 3.0, 0.0]), torch.zeros(4, dtype=torch.int64)
    assert not op(rewards, one_group, None, None, "pass_at_k", 0.0).any()
    rewards[3] = 4.0
    lead = op(rewards, one_group, None, None, "pass_at_k", 0.0)
    assert lead[:3].tolist() == [0, 0, 0] and lead[3] == pytest.approx(1 / statistics.stdev([1, 3, 3, 4]))


def test_opo_without_a_token_weighs_all_alike(op):
    result = op(torch.tensor([3.0, 5.0]), torch.tensor([0, 0]), torch.tensor([0, 0]), None, "opo", 0.0)
    assert result.tolist() == [-1, 1]


def test_a_greedy_reward_that_is_not_finite_spoils_its_own_sequence(op):
    greedy = torch.tensor([1.0, math.nan, math.inf])
    result = op(torch.ones(3), torch.zeros(3, dtype=torch.int64), None, greedy, "remax", 0.0)
    assert result[0] == 0 and result[1:].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_sequences", [0, 1, 2, 33, 257])
def test_agrees_with_the_definition(num_sequences, kind, device):
    rewards, group_ids = inputs(num_sequences, device=device)
    exact, peer = oracle(rewards, group_ids, kind), float32_path(rewards, group_ids, kind)
    assert_as_accurate(group_advantages(rewards, group_ids, kind=kind, **extras(kind, rewards)), exact, peer)
    assert_as_accurate(run(_group_advantages.reference, rewards, group_ids, kind), exact, peer)


@pytest.mark.parametrize("op", ["compared", "sorted"], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_triton_agrees_with_the_definition(kind, op):
    """Rewards in bfloat16 and ids in int32 too; groups of one, and larger than a block."""
    for num_sequences, dtype, index in (
        (33, torch.float32, torch.int64),
        (1, torch.half, torch.int64),
        (20, torch.bfloat16, torch.int32),
    ):
        rewards, group_ids = inputs(num_sequences, dtype)
        group_ids = group_ids.where(group_ids > 5, 0).to(index)
        exact, peer = oracle(rewards, group_ids, kind), float32_path(rewards, group_ids, kind)
        assert_as_accurate(run(op, rewards, group_ids, kind), exact, peer)
    assert run(op, *inputs(0), kind).shape == (0,)


@pytest.mark.parametrize("op", ["compared"], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_triton_equal_rewards_have_no_advantage(kind, op):
    rewards, group_ids = torch.full((20,), 0.1), torch.zeros(20, dtype=torch.int64)
    lengths, baseline = extras(kind, rewards).get("lengths"), rewards if kind == "remax" else None
    assert not op(rewards, group_ids, lengths, baseline, kind, 0.0).any()


@pytest.mark.gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_sequences", [700, 9000], ids=["compared", "sorted"])
def test_nothing_waits_and_a_graph_captures_it(kind, num_sequences):
    rewards, group_ids = inputs(num_sequences, device="cuda")
    group_ids = group_ids.where(group_ids % 3 > 0, 0)
    options = extras(kind, rewards)

    def step():
        return group_advantages(rewards, group_ids, kind=kind, **options)

    step()
    torch.cuda.set_sync_debug_mode("error")
    direct = step()
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(replayed(step), direct)
    on_cpu = {name: x.cpu() for name, x in options.items()}
    torch.testing.assert_close(direct.cpu(), group_advantages(rewards.cpu(), group_ids.cpu(), kind=kind, **on_cpu))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype, kind):
    rewards, group_ids = inputs(50, dtype)
    result = run(_group_advantages, rewards, group_ids, kind)
    assert result.dtype == torch.promote_types(dtype, torch.float32)
    assert_as_accurate(result, oracle(rewards, group_ids, kind), float32_path(rewards, group_ids, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_that_are_not_finite_stay_alone(kind, op):
    rewards, group_ids = inputs(40)
    rewards[3], rewards[9], rewards[20] = math.nan, math.inf, -math.inf
    finite = rewards.isfinite()
    result = run(op, rewards, group_ids, kind)
    assert torch.equal(result.isnan(), ~finite)
    assert_as_accurate(result[finite], oracle(rewards, group_ids, kind)[finite], result[finite])


@pytest.mark.unpoisoned  # else NaN is what an unwritten advantage holds
@pytest.mark.parametrize("op", ["reference", "compared", "sorted"], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_out_of_range_give_nan_where_nothing_can_be_raised(kind, op):
    rewards, group_ids = torch.tensor([1.0, 2, 3, 5]), torch.tensor([0, 1 << 40, 0, -1])
    inside = rewards[::2].contiguous()
    options = {name: x[[0, 2]] for name, x in extras(kind, rewards).items()}
    expected = group_advantages(inside, torch.tensor([0, 0]), kind=kind, **options)
    result = run(op, rewards, group_ids, kind)
    assert result[[1, 3]].isnan().all() and torch.equal(result[[0, 2]], expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_have_no_advantage(dtype, kind, device):
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("no float64 on CUDA")
    rewards = torch.full((7,), 0.1, dtype=dtype, device=device)
    options = {name: rewards if name == "baseline" else x for name, x in extras(kind, rewards).items()}
    group_ids = torch.zeros_like(rewards, dtype=torch.int32)
    assert not group_advantages(rewards, group_ids, kind=kind, eps=0.0, **options).any()


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
    with pytest.raises(RuntimeError, match="is not differentiable"):
        group_advantages(rewards.requires_grad_(), group_ids).sum().backward()


def test_opcheck():
    rewards, group_ids = inputs(9)
    for kind in KINDS:
        options = extras(kind, rewards)
        optional = options.get("lengths"), options.get("baseline")
        torch.library.opcheck(_group_advantages.op, (rewards, group_ids, *optional, kind, 1e-6))
    torch.library.opcheck(_group_advantages.op, (*inputs(0, torch.bfloat16), None, None, "rloo", 1e-6))


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
        (ValueError, "kind must be one of rloo, grpo, .*, remax, got 'gspo'", {"kind": "gspo"}),
        (ValueError, "lengths must be given for kind 'opo' only, got None for 'opo'", {"kind": "opo"}),
        (ValueError, "lengths must be given for kind 'opo' only, got a tensor for 'rloo'", {"lengths": IDS}),
        (ValueError, "baseline must be given for kind 'remax' only, got None for 'remax'", {"kind": "remax"}),
        (ValueError, "baseline must be .* only, got a tensor for 'grpo'", {"kind": "grpo", "baseline": torch.ones(3)}),
        (TypeError, r"baseline must be \[S\] float32, got \[3\] int64", {"kind": "remax", "baseline": IDS}),
        (ValueError, r"lengths must be \[S\] .* with S = 3, got \[2\] int64", {"kind": "opo", "lengths": IDS[:2]}),
        (ValueError, "lengths must be >= 0, got -1 at index 0", {"kind": "opo", "lengths": IDS - 1}),
        (ValueError, "eps must be >= 0, got nan", {"eps": math.nan}),
    ],
)
def test_bad_input(error, message, options):
    with pytest.raises(error, match=message):
        group_advantages(**{"rewards": torch.zeros(3), "group_ids": IDS} | options)
