"""process_advantages: golden values of PURE, padded transcriptions of its four estimators, corner cases, bits.

The transcriptions are the papers' and codes' definitions on [S, width] tensors, one answer at a time.
"""

import itertools
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accuracy import assert_as_accurate
from grids import cu_seqlens
from hypothesis import given, settings
from hypothesis import strategies as st
from test_min_form_returns import oracle_steps

from qrm_fast import from_padded, process_advantages, to_padded
from qrm_fast.ops.min_form_returns import _min_form_returns
from qrm_fast.ops.process_advantages import PRESETS, _process_advantages, _process_rows
from qrm_fast.ops.step_rows import step_rows

N = 12
GOLDEN = {
    "step_rewards": torch.tensor([0.9, -0.4, 0.7, 0.2, 0.6], dtype=torch.float64),
    "step_ends": torch.tensor([2, 5, 9, 11, 14]),
    "cu_seqlens": torch.tensor([0, 6, 10, 15]),
    "group_ids": torch.tensor([1, 1, 1]),
    "outcome_rewards": torch.tensor([0.0, 1, 1], dtype=torch.float64),
    "max_gen_len": N,
}
EXPECTED = {
    "paper": [-1.535278901] * 3 + [-1.535280935] * 3 + [1.281384347] * 4 + [0.690527337] * 2 + [0.494124579] * 3,
    # v - loo + G_t - b (n - t + 1), with b = (.401798621, -.048200644, .250000735) and G = (S, r*_n)
    "paper-step": [-1 - 0.399997062 - 2 * 0.401798621] * 3
    + [-1 - 0.399999096 - 0.401798621] * 3
    + [0.5 + 0.7 + 0.048200644] * 4
    + [0.5 + 0.207194484 - 2 * 0.250000735] * 2
    + [0.5 + 0.010791726 - 0.250000735] * 3,
    "openrlhf": [-1.265035362] * 2
    + [0]
    + [-1.110463091] * 2
    + [0]
    + [1.077950983] * 3
    + [0, 0.590772928, 0]
    + [0.463185514] * 2
    + [0],
    "verl": [-1.146857114] * 3 + [-1.146858955] * 3 + [1.099832919] * 4 + [0.602975670] * 2 + [0.425288397] * 3,
}


@pytest.fixture(params=["kernel", "reference"])
def implementation(request, monkeypatch):
    if request.param == "reference":
        module = "qrm_fast.ops.process_advantages."
        monkeypatch.setattr(f"{module}_min_form_returns", _min_form_returns.reference)
        monkeypatch.setattr(f"{module}_process_advantages", _process_advantages.reference)
        monkeypatch.setattr(f"{module}_process_rows", _process_rows.reference)
        monkeypatch.setattr(f"{module}step_rows", step_rows.reference)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("preset", PRESETS)
def test_golden_c(preset):
    result = process_advantages(**GOLDEN, preset=preset)
    torch.testing.assert_close(result, torch.tensor(EXPECTED[preset], dtype=torch.float64), rtol=0, atol=2e-9)


def transcription(
    step_rewards,
    step_ends,
    cu,
    group_ids,
    *,
    outcome_rewards,
    preset,
    dtype=torch.float64,
    operator="soft",
    max_gen_len=None,
    kl=None,
    process_coef=1.0,
    outcome_coef=1.0,
    mask_step_ends=None,
):
    """The estimator on padded rows, in `dtype`; every answer ends with a step, every group has two answers."""
    num_sequences, lengths = len(cu) - 1, cu.diff().tolist()
    width = max_gen_len or max(lengths)
    reward, ends, real = torch.zeros(3, num_sequences, width, dtype=dtype).unbind()
    ends, real = ends.bool(), real.bool()
    penalty, num_steps = torch.zeros_like(reward), []
    for i, (bos, eos) in enumerate(itertools.pairwise(cu.tolist())):
        mine = (step_ends >= bos) & (step_ends < eos)
        real[i, : eos - bos] = True
        ends[i, step_ends[mine] - bos] = True
        r = step_rewards[mine].to(dtype)
        star = (-r / 0.1).softmax(0) * r
        if operator != "soft":
            g = torch.tensor([*oracle_steps(r.tolist(), operator, 0.1), 0.0], dtype=dtype)
            star = g[:-1] - g[1:]
        reward[i, step_ends[mine] - bos] = star
        num_steps.append(len(r))
        if kl is not None:
            penalty[i, : eos - bos] = kl[bos:eos].to(dtype)
    outcome = outcome_rewards.to(dtype)

    def to_go(x):
        return x.flip(1).cumsum(1).flip(1)

    advantages = torch.zeros_like(reward)
    for i in range(num_sequences):
        others = [k for k in range(num_sequences) if group_ids[k] == group_ids[i] and k != i]
        loo = outcome_coef * (outcome[i] - outcome[others].mean())
        if preset == "paper":
            baseline = to_go(reward)[others].sum() / (len(others) * max_gen_len)
            advantages[i] = loo + process_coef * (to_go(reward)[i] - baseline) - to_go(penalty)[i]
        elif preset == "paper-step":
            baseline = sum(reward[k].sum() / num_steps[k] for k in others) / len(others)
            stars = to_go((reward - baseline * ends)[i : i + 1])[0]
            advantages[i] = loo + process_coef * stars - to_go(penalty)[i]
        elif preset == "openrlhf":
            beta = reward[others].sum() / sum(lengths[k] for k in others)
            token_reward, in_step = process_coef * reward[i], 0
            for t in range(lengths[i]):
                if ends[i, t]:
                    token_reward[t] -= process_coef * beta * in_step
                    in_step = 0
                else:
                    in_step += 1
            solved = outcome - 1
            token_reward[lengths[i] - 1] += outcome_coef * (solved[i] - solved[others].mean())
            advantages[i] = to_go((token_reward - penalty[i])[None])[0]
        else:
            score = process_coef * reward - penalty
            for k in range(num_sequences):
                score[k, lengths[k] - 1] += outcome_coef * outcome[k]
            baseline = (to_go(score) * real)[others].sum() / (len(others) * max_gen_len)
            advantages[i] = to_go(score)[i] - baseline
    if mask_step_ends or (preset == "openrlhf" and mask_step_ends is None):
        advantages[ends] = 0
    if preset == "openrlhf":
        counted = real & (advantages != 0)
        count = counted.sum()
        mean = advantages[real].sum() / count
        variance = ((advantages - mean)[real] ** 2).sum() / count
        advantages = torch.where(counted, (advantages - mean) * variance.clamp(min=1e-8).rsqrt(), 0.0)
    elif preset == "verl":
        counted = real & ~(ends & bool(mask_step_ends))
        x = advantages[counted]
        variance = (x - x.mean()).square().sum() / (len(x) - 1)
        advantages = torch.where(counted, (advantages - x.mean()) * (variance + 1e-8).rsqrt(), 0.0)
    return advantages[real]


def inputs(lengths, dtype=torch.float32, share=0.15, answers=4):
    g = torch.Generator().manual_seed(len(lengths))
    acc = torch.promote_types(dtype, torch.float32)
    cu = cu_seqlens(lengths)
    is_end = torch.rand(sum(lengths), generator=g) < share
    is_end[cu[1:][cu.diff() > 0].long() - 1] = True
    ends = is_end.nonzero()[:, 0]
    group_ids = (torch.arange(len(lengths)) // answers)[torch.randperm(len(lengths), generator=g)]
    return {
        "step_rewards": torch.rand(len(ends), generator=g).mul(2).sub(1).to(dtype),
        "step_ends": ends,
        "cu_seqlens": cu,
        "group_ids": group_ids,
        "outcome_rewards": (torch.rand(len(lengths), generator=g) < 0.5).to(acc),
        "max_gen_len": max([*lengths, 7]) + 5,
    }, torch.rand(sum(lengths), generator=g).sub(0.3).mul(0.01).to(acc)


LENGTHS = {"few": [5, 9], "odd": [3, 1, 7, 63, 65, 2, 30, 8], "many": [1 + i * 37 % 90 for i in range(60)]}
CASES = {
    "default": lambda kl: {},
    "penalised": lambda kl: {"kl": kl},
    "everything": lambda kl: {"kl": kl, "process_coef": 0.5, "outcome_coef": 2.0, "mask_step_ends": True},
    "open ends, causal": lambda kl: {"mask_step_ends": False, "operator": "causal_soft"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("preset", PRESETS)
def test_agrees_with_the_padded_transcription(preset, lengths, case, device):
    arguments, kl = inputs(LENGTHS[lengths])
    options = CASES[case](kl)
    exact, peer = (
        transcription(*list(arguments.values())[:4], outcome_rewards=arguments["outcome_rewards"], preset=preset,
                      max_gen_len=arguments["max_gen_len"], dtype=dtype, **options)
        for dtype in (torch.float64, torch.float32)
    )  # fmt: skip
    on_device = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in (arguments | options).items()}
    assert_as_accurate(process_advantages(**on_device, preset=preset), exact, peer)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_dtypes(preset, dtype):
    arguments, kl = inputs([3, 1, 7, 20, 33, 2, 30, 8], dtype)
    options = CASES["everything"](kl)
    result = process_advantages(**arguments, **options, preset=preset)
    assert result.dtype == kl.dtype
    exact = transcription(
        *list(arguments.values())[:4],
        outcome_rewards=arguments["outcome_rewards"],
        preset=preset,
        max_gen_len=arguments["max_gen_len"],
        **options,
    )
    torch.testing.assert_close(result.double(), exact, rtol=2e-7 if dtype == torch.bfloat16 else 1e-12, atol=1e-12)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("preset", PRESETS)
def test_answers_alone_or_without_steps_or_outcome(preset):
    """Group 0: a lone answer. Group 2: one without steps, one empty, one without an answer to verify, two whole."""
    arguments = {
        "step_rewards": torch.tensor([0.5, -0.5, 0.25, 1.0], dtype=torch.float64),
        "step_ends": torch.tensor([1, 5, 7, 9]),
        "cu_seqlens": torch.tensor([0, 2, 4, 4, 6, 8, 10]),
        "group_ids": torch.tensor([0, 2, 2, 2, 2, 2]),
        "outcome_rewards": torch.tensor([1.0, 1, 0, 1, 0, 1], dtype=torch.float64),
        "has_answer": torch.tensor([True, True, True, False, True, True]),
    }
    raw = {"mask_step_ends": False, "max_gen_len": 2, "preset": preset, "temperature": 0.0}
    result = process_advantages(**arguments, **raw)
    # returns: .5 in rows 0-1, none in rows 2-3, -.5 in rows 4-5, .25 in rows 6-7, 1 in rows 8-9
    if preset == "verl":
        # scores 2 (.5 + 1), 2 (1), -, 2 (-.5), 2 (.25), 2 (1 + 1), over N = 2 and 3 others
        raw = [1.5 - 0, 1 - (-0.5 + 0.25 + 2) / 3, -0.5 - (1 + 0.25 + 2) / 3, 0.25 - (1 - 0.5 + 2) / 3, 2 - 0.75 / 3]
        expected = torch.tensor(raw, dtype=torch.float64).repeat_interleave(2)
        expected = (expected - expected.mean()) * (expected.var() + 1e-8).rsqrt()
    else:
        # outcomes: others of row 2 are 0 and 1, of row 6 1 and 1, of row 8 1 and 0; none for row 4
        outcome = [0.0 if preset == "openrlhf" else 1.0, 0.5, 0, -1, 0.5]
        others = [0, 0, (0.25 + 1) / 2, (-0.5 + 1) / 2, (-0.5 + 0.25) / 2]
        # over N = 2, a row of each of the others in openrlhf, 1 step
        scale = 0.5 if preset == "openrlhf" else 1
        process = [0.5, 0, -0.5, 0.25, 1]
        raw = [a + g - scale * b for a, g, b in zip(outcome, process, others, strict=True)]
        expected = torch.tensor(raw, dtype=torch.float64).repeat_interleave(2)
        if preset == "openrlhf":
            expected = (expected - expected.mean()) * expected.var(correction=0).rsqrt()
    torch.testing.assert_close(result, expected)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("preset", PRESETS)
def test_rows_after_the_last_step(preset):
    """Return 0; nothing of a baseline per step or per row is left, that of a whole answer stays."""
    arguments = {
        "step_rewards": torch.tensor([0.5, 1.0], dtype=torch.float64),
        "step_ends": torch.tensor([1, 4]),
        "cu_seqlens": torch.tensor([0, 3, 5]),
        "group_ids": torch.tensor([0, 0]),
    }
    result = process_advantages(**arguments, preset=preset, max_gen_len=4, mask_step_ends=False)
    # sums of returns 1 and 2, each over one other and N = 4; a step of 2 rows has one row that ends none
    raw = {
        "paper": [0, 0, -0.5, 0.75, 0.75],
        "paper-step": [-0.5, -0.5, 0, 0.5, 0.5],
        "openrlhf": [0, 0, 0, 1 - 0.5 / 3, 1 - 0.5 / 3],
        "verl": [0, 0, -0.5, 0.75, 0.75],
    }[preset]
    expected = torch.tensor(raw, dtype=torch.float64)
    if preset == "verl":
        expected = (expected - expected.mean()) * (expected.var() + 1e-8).rsqrt()
    if preset == "openrlhf":  # true zeros are neither counted nor moved, but lie in the sum of squares
        mean = expected[3]
        expected = (expected - mean).where(expected != 0, 0.0) * (3 * mean**2 / 2).rsqrt()
    torch.testing.assert_close(result, expected)


def with_a_group_of_zeros():
    """Group 1 has equal outcomes, and rewards only in the first steps of its first answer: its other rows are 0."""
    arguments, kl = inputs([30, 25, 40, 35], share=0.5)
    arguments["group_ids"] = torch.tensor([0, 0, 1, 1])
    arguments["outcome_rewards"] = torch.tensor([1.0, 0, 1, 1])
    arguments["step_rewards"][(arguments["step_ends"] >= 55).nonzero()[3:]] = 0.0
    kl[55:] = 0.0
    return arguments, kl


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("penalised", [False, True])
def test_openrlhf_whitens_without_rows_of_zero(penalised):
    arguments, kl = with_a_group_of_zeros()
    options = {"kl": kl} if penalised else {}
    exact, peer = (
        transcription(*list(arguments.values())[:4], outcome_rewards=arguments["outcome_rewards"], preset="openrlhf",
                      dtype=dtype, **options)
        for dtype in (torch.float64, torch.float32)
    )  # fmt: skip
    assert_as_accurate(process_advantages(**arguments, preset="openrlhf", **options), exact, peer)


@pytest.mark.usefixtures("implementation")
def test_rows_that_are_not_finite_are_no_zeros():
    arguments, kl = with_a_group_of_zeros()
    kl[-1] = math.nan
    options = {"preset": "openrlhf", "mask_step_ends": False}
    result = process_advantages(**arguments, kl=kl, **options)
    ends = arguments["step_ends"]
    first = arguments | {
        "step_rewards": arguments["step_rewards"][ends < 95],
        "step_ends": ends[ends < 95],
        "cu_seqlens": arguments["cu_seqlens"][:4],
        "group_ids": arguments["group_ids"][:3],
        "outcome_rewards": arguments["outcome_rewards"][:3],
    }
    alone = process_advantages(**first, kl=kl[:95], **options)
    torch.testing.assert_close(result[:95], alone, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("share", [0.15, 1.0])
@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_not_finite_stays_in_its_sequence(preset, share):
    arguments, kl = inputs([5, 9, 4, 6, 3, 8, 2, 7], share=share)
    arguments["group_ids"].zero_()
    options = {"preset": preset, "kl": kl}
    bad_step, bad_outcome = 1, 4
    rewards, outcomes = arguments["step_rewards"].clone(), arguments["outcome_rewards"].clone()
    rewards[(arguments["step_ends"] >= 5).nonzero()[0]] = math.inf
    outcomes[bad_outcome] = math.nan
    result = process_advantages(**arguments | {"step_rewards": rewards, "outcome_rewards": outcomes}, **options)
    i_seq = torch.repeat_interleave(torch.arange(8), arguments["cu_seqlens"].diff())
    masked = torch.zeros(44, dtype=torch.bool)
    if preset == "openrlhf":
        masked[arguments["step_ends"]] = True
    broken = ((i_seq == bad_step) | (i_seq == bad_outcome)) & ~masked
    assert torch.equal(result.isnan(), broken)

    # verl compares one joint score, so there the others see neither sequence.
    if preset == "verl":
        kept = torch.tensor([0, 2, 3, 5, 6, 7])
        lengths = arguments["cu_seqlens"].diff()[kept].tolist()
        rows = torch.isin(i_seq, kept)
        steps = rows[arguments["step_ends"]]
        alone = process_advantages(
            arguments["step_rewards"][steps],
            (rows.cumsum(0) - 1)[arguments["step_ends"][steps]],
            cu_seqlens(lengths),
            arguments["group_ids"][kept],
            outcome_rewards=arguments["outcome_rewards"][kept],
            max_gen_len=arguments["max_gen_len"],
            kl=kl[rows],
            preset=preset,
        )
        torch.testing.assert_close(result[rows], alone, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_to_do(preset):
    none = torch.zeros(0)
    options = {"preset": preset, "max_gen_len": 5}
    for cu in [0], [0, 0]:
        ids = torch.zeros(len(cu) - 1, dtype=torch.int64)
        assert process_advantages(none, ids[:0], torch.tensor(cu), ids, **options).shape == (0,)
    # no process rewards, equal outcomes: no advantage, and no NaN from whitening zeros
    one_group = torch.zeros(3, dtype=torch.int64)
    result = process_advantages(
        none, one_group[:0], torch.tensor([0, 2, 3, 7]), one_group, outcome_rewards=torch.ones(3), **options
    )
    if preset != "verl":
        assert not result.any()
    assert result.isfinite().all()


@pytest.mark.usefixtures("implementation")
def test_outcomes_alone_are_rloo():
    one_group = torch.zeros(4, dtype=torch.int64)
    result = process_advantages(
        torch.zeros(0),
        one_group[:0],
        torch.tensor([0, 2, 3, 7, 8]),
        one_group,
        outcome_rewards=torch.tensor([1.0, 0, 0, 0]),
        max_gen_len=5,
    )
    third = -1 / 3
    torch.testing.assert_close(result, torch.tensor([1, 1, *[third] * 6]))


def test_ids_out_of_range_give_nan_where_nothing_can_be_raised(monkeypatch):
    """The reference serves CUDA, where a kernel cannot raise."""
    for op in _process_advantages, _process_rows:
        monkeypatch.setattr(f"qrm_fast.ops.process_advantages._{op.op._name}", op.reference)
    for preset in PRESETS:
        wrong = GOLDEN | {"group_ids": torch.tensor([1, 3, 1])}
        result = process_advantages(**wrong, preset=preset, mask_step_ends=False)
        assert result[6:10].isnan().all() and result[:6].isfinite().all() and result[10:].isfinite().all()


def test_eos_only_answer_is_silenced_by_the_mask_alone():
    """Seven long answers and one bare EOS that the PRM likes: the mask is what keeps it from winning."""
    lengths = [600] * 7 + [1]
    ends = torch.tensor([299 + 300 * i for i in range(14)] + [4200])
    rewards = torch.tensor([0.3, -0.25, 0.2, -0.2, 0.3, -0.1, 0.2, 0.0, 0.3, 0.05, 0.2, 0.07, 0.3, -0.15, 0.9])
    arguments = (rewards, ends, cu_seqlens(lengths), torch.zeros(8, dtype=torch.int64))
    verl = process_advantages(*arguments, preset="verl", max_gen_len=7168)
    open_ends = process_advantages(*arguments, preset="openrlhf", mask_step_ends=False)
    masked = process_advantages(*arguments, preset="openrlhf")
    assert verl[-1] > 4 and open_ends[-1] > 4 and masked[-1] == 0


def test_padded_trainers_get_the_same_numbers():
    """[B, L] step-reward masks, right-padded, through from_padded and back."""
    mask = torch.arange(9) < torch.tensor([[5], [9], [0], [7]])
    g = torch.Generator().manual_seed(0)
    is_end = mask & (torch.rand(4, 9, generator=g) < 0.4)
    scores = torch.rand(4, 9, generator=g).where(is_end, math.nan)
    kl = torch.rand(4, 9, generator=g).where(mask, math.nan)
    cu, ends, rewards, packed_kl = from_padded(mask, is_end, scores, kl)
    step_ends = ends.nonzero()[:, 0]
    options = {"max_gen_len": 9, "preset": "verl"}
    group_ids, outcome = torch.zeros(4, dtype=torch.int64), torch.tensor([1.0, 0, 1, 0])
    packed = process_advantages(
        rewards[step_ends], step_ends, cu, group_ids, outcome_rewards=outcome, kl=packed_kl, **options
    )
    padded = to_padded(packed, cu, 9)
    assert torch.equal(padded[mask], packed) and not padded[~mask].any()

    # by hand on the padded rows
    x = torch.zeros(4, 9, dtype=torch.float64)
    for b in range(4):
        r = scores[b][is_end[b]].double()
        x[b][is_end[b]] = (-r / 0.1).softmax(0) * r
        if mask[b].any():
            x[b, mask[b].sum() - 1] += outcome[b]
    to_go = (x - kl.where(mask, 0.0)).flip(1).cumsum(1).flip(1) * mask
    totals = to_go.sum(1)
    advantages = to_go - ((totals.sum() - totals) / (2 * 9))[:, None]
    kept = advantages[mask]
    torch.testing.assert_close(padded[mask].double(), (kept - kept.mean()) * (kept.var() + 1e-8).rsqrt())


def on_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    arguments, _ = inputs(LENGTHS["odd"], torch.float64)
    arguments["group_ids"] = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    first, last = [(0, 3), (3, 8)][rank]
    cu = arguments["cu_seqlens"]
    mine = (arguments["step_ends"] >= cu[first]) & (arguments["step_ends"] < cu[last])
    local = (
        arguments["step_rewards"][mine],
        arguments["step_ends"][mine] - cu[first],
        cu[first : last + 1] - cu[first],
    )
    ids, outcome = arguments["group_ids"][first:last], arguments["outcome_rewards"][first:last]
    results = {
        preset: process_advantages(
            *local, ids, outcome_rewards=outcome, preset=preset, max_gen_len=80, process_group=dist.group.WORLD
        )
        for preset in PRESETS
    }
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_a_process_group_whitens_one_batch(tmp_path):
    mp.spawn(on_rank, args=(tmp_path,), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    arguments, _ = inputs(LENGTHS["odd"], torch.float64)
    arguments |= {"group_ids": torch.tensor([0, 0, 0, 1, 1, 1, 1, 1]), "max_gen_len": 80}
    for preset in PRESETS:
        whole = process_advantages(**arguments, preset=preset)
        torch.testing.assert_close(torch.cat([rank[preset] for rank in ranks]), whole, rtol=1e-12, atol=1e-14)


@pytest.mark.unpoisoned
@settings(deadline=None, max_examples=25)
@given(lengths=st.lists(st.integers(0, 50), min_size=2, max_size=9), preset=st.sampled_from(PRESETS), data=st.data())
def test_the_order_of_sequences_changes_statistics_by_rounding_only(lengths, preset, data):
    arguments, kl = inputs(lengths, torch.float64, answers=3)
    order = data.draw(st.permutations(range(len(lengths))))
    cu, ends = arguments["cu_seqlens"], arguments["step_ends"]
    moved_cu = cu_seqlens([lengths[i] for i in order])
    steps = [(ends >= cu[i]) & (ends < cu[i + 1]) for i in order]
    rows = torch.cat([torch.arange(cu[i], cu[i + 1]) for i in order])
    moved = process_advantages(
        torch.cat([arguments["step_rewards"][m] for m in steps]),
        torch.cat([ends[m] - cu[i] + moved_cu[j] for j, (i, m) in enumerate(zip(order, steps, strict=True))]),
        moved_cu,
        arguments["group_ids"][order],
        outcome_rewards=arguments["outcome_rewards"][order],
        max_gen_len=arguments["max_gen_len"],
        kl=kl[rows],
        preset=preset,
    )
    packed = process_advantages(**arguments, kl=kl, preset=preset)
    torch.testing.assert_close(moved, packed[rows], rtol=1e-9, atol=1e-9)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("preset", PRESETS)
def test_bits_do_not_depend_on_threads(preset):
    arguments, kl = inputs([1 + i * 37 % 300 for i in range(200)])
    threads = torch.get_num_threads()
    try:
        results = []
        for num_threads in 1, 2, 2:
            torch.set_num_threads(num_threads)
            results.append(process_advantages(**arguments, kl=kl, preset=preset))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])


def test_index_dtypes_and_given_length():
    for preset in PRESETS:
        narrow = {
            k: v.int() if isinstance(v, torch.Tensor) and v.dtype == torch.int64 else v for k, v in GOLDEN.items()
        }
        expected = process_advantages(**GOLDEN, preset=preset)
        assert torch.equal(process_advantages(**narrow, preset=preset, num_tokens=15), expected)


def test_not_differentiable():
    leaf = GOLDEN["step_rewards"].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="is not differentiable"):
        process_advantages(**GOLDEN | {"step_rewards": leaf}).sum().backward()


def test_opcheck():
    arguments, kl = inputs([5, 0, 9, 4])
    rewards, ends, cu, ids, outcome, max_gen_len = arguments.values()
    has_answer = torch.tensor([True, False, True, True])
    returns = rewards.double()
    options = (len(kl), "verl", float(max_gen_len), 0.5, 1.0, True)
    torch.library.opcheck(_process_advantages.op, (returns, ends, cu, ids, outcome, has_answer, kl, *options))
    options = (len(kl), "openrlhf", 1.0, 1.0, 1.0, False)
    torch.library.opcheck(_process_advantages.op, (returns, ends.int(), cu.long(), ids, None, None, None, *options))
    options = (len(kl), "soft", 0.1, "verl", float(max_gen_len), 0.5, 1.0, True)
    torch.library.opcheck(_process_rows.op, (rewards, ends, cu, ids, outcome, has_answer, kl, *options))


def test_compiles_whole_and_for_any_length():
    compiled = torch.compile(process_advantages, fullgraph=True, dynamic=True)
    for lengths in [30, 4, 9, 50], [8, 1, 6, 60, 70, 2], [10, 20]:
        arguments, kl = inputs(lengths)
        options = arguments | {"kl": kl, "preset": "openrlhf"}
        torch.testing.assert_close(compiled(**options), process_advantages(**options), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "error, message, options",
    [
        (ValueError, "step_ends must ascend, got 5 then 2 at index 1", {"step_ends": torch.tensor([5, 2, 9, 11, 14])}),
        (ValueError, r"group_ids must be \[S\] .* with S = 3, got \[2\]", {"group_ids": torch.tensor([0, 0])}),
        (ValueError, r"group_ids must lie in \[0, 3\), got 3 at index 1", {"group_ids": torch.tensor([0, 3, 0])}),
        (TypeError, r"outcome_rewards must be \[S\] float64, got \[3\] float32", {"outcome_rewards": torch.ones(3)}),
        (TypeError, r"has_answer must be \[S\] bool, got \[3\] float32", {"has_answer": torch.ones(3)}),
        (
            ValueError,
            "has_answer must be given with outcome_rewards only, got None for them",
            {"has_answer": torch.ones(3).bool(), "outcome_rewards": None},
        ),
        (ValueError, "preset must be one of paper, paper-step, openrlhf, verl, got 'grpo'", {"preset": "grpo"}),
        (ValueError, "operator must be one of soft, .* got 'min'", {"operator": "min"}),
        (ValueError, "max_gen_len must be given for preset 'verl', .* None", {"preset": "verl", "max_gen_len": None}),
        (ValueError, "max_gen_len must be positive, got 0", {"max_gen_len": 0}),
        (TypeError, r"kl must be \[T\] float64, got \[15\] float32", {"kl": torch.zeros(15)}),
        (
            ValueError,
            "num_tokens must be the length of kl, 15, got 14",
            {"kl": torch.zeros(15, dtype=torch.float64), "num_tokens": 14},
        ),
        (ValueError, "cu_seqlens must end at the number of packed rows, 16, got 15", {"num_tokens": 16}),
    ],
)
def test_bad_input(error, message, options):
    with pytest.raises(error, match=message):
        process_advantages(**GOLDEN | options)
