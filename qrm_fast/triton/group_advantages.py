"""Triton kernel of group_advantages: one launch, in which the first sequence of each group works for all its members.

A group is read up to three times from L2, some 12 bytes per sequence each, and 4 are written. In float64, where the
mean of equal float32 rewards is exact, so that they have no advantage. groups.py says how members are found.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ..ops.group_advantages import _group_advantages
from .groups import LAUNCH, by_group, led_group, members


@triton.jit
def member_rewards(rewards, o_s, m_s):
    """The rewards, 0 where there is none, and which of them are finite."""
    b_r = tl.load(rewards + o_s, m_s, 0.0).to(tl.float64)
    m_finite = m_s & (b_r - b_r == 0.0)
    return tl.where(m_finite, b_r, 0.0), m_finite


@triton.jit(do_not_specialize=["num_sequences"])
def group_advantages(
    rewards,  # [S]
    ids,  # [S], of by_group
    order,  # [S] or None
    lengths,  # [S] or None
    baseline,  # [S] or None
    advantages,  # [S]
    num_sequences,
    eps: tl.float64,
    KIND: tl.constexpr,
    BS: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    i_s, group, inside, end = led_group(ids, order, i, num_sequences, BS)
    tl.store(advantages + i_s, float("nan"), ~inside)

    b_n = tl.zeros([BS], tl.float64)
    b_sum = tl.zeros([BS], tl.float64)
    b_best = tl.full([BS], -float("inf"), tl.float64)
    for begin in range(i, end, BS):
        o_s, m_s = members(ids, order, begin, end, group, BS)
        b_r, m_s = member_rewards(rewards, o_s, m_s)
        b_n += tl.where(m_s, 1.0, 0.0)
        b_sum += b_r
        b_best = tl.where(m_s, tl.maximum(b_best, b_r), b_best)
    n = tl.sum(b_n, 0)
    mean = tl.sum(b_sum, 0) / n
    best = tl.max(b_best, 0)

    b_m2 = tl.zeros([BS], tl.float64)
    b_weight = tl.zeros([BS], tl.float64)
    b_weighted = tl.zeros([BS], tl.float64)
    b_ties = tl.zeros([BS], tl.float64)
    b_second = tl.full([BS], -float("inf"), tl.float64)
    if KIND == "grpo" or KIND == "pass_at_k" or KIND == "opo":
        for begin in range(i, end, BS):
            o_s, m_s = members(ids, order, begin, end, group, BS)
            b_r, m_s = member_rewards(rewards, o_s, m_s)
            b_deviation = tl.where(m_s, b_r - mean, 0.0)
            if lengths is not None:
                b_length = tl.load(lengths + o_s, m_s, 0).to(tl.float64)
                b_weight += b_length
                b_weighted += b_length * b_deviation
            else:
                b_m2 += b_deviation * b_deviation
                b_ties += tl.where(m_s & (b_r == best), 1.0, 0.0)
                b_second = tl.where(m_s & (b_r < best), tl.maximum(b_second, b_r), b_second)
    std = tl.sqrt(tl.sum(b_m2, 0) / (n - 1.0))
    # about the mean, which is what remains where no sequence of the group has tokens
    shift = tl.sum(b_weighted, 0) / tl.maximum(tl.sum(b_weight, 0), 1.0)
    lead = tl.where(tl.sum(b_ties, 0) == 1.0, best - tl.max(b_second, 0), 0.0)
    prize = tl.where(n > 1.0, tl.where(lead > 0.0, lead / (std + eps), 0.0), 0.0)

    for begin in range(i, end, BS):
        o_s, m_group = members(ids, order, begin, end, group, BS)
        b_r, m_s = member_rewards(rewards, o_s, m_group)
        b_deviation = b_r - mean
        if KIND == "rloo":
            b_a = tl.where(n == 1.0, b_r, b_deviation * n / (n - 1.0))
        elif KIND == "grpo":
            b_a = tl.where(n == 1.0, b_r, tl.where(b_deviation == 0.0, 0.0, b_deviation / (std + eps)))
        elif KIND == "opo":
            b_a = b_deviation - shift
        elif KIND == "pass_at_k":
            b_a = tl.where(b_r == best, prize, 0.0)
        elif KIND == "remax":
            b_a = b_r - tl.load(baseline + o_s, m_s, 0.0).to(tl.float64)
        else:
            b_a = b_deviation
        b_a = tl.where(m_s & (b_a - b_a == 0.0), b_a, float("nan"))
        tl.store(advantages + o_s, b_a.to(tl.float32), m_group)


def launch(
    rewards: Tensor, group_ids: Tensor, lengths: Tensor | None, baseline: Tensor | None, kind: str, eps: float
) -> Tensor:
    num_sequences = rewards.shape[0]
    advantages = torch.empty_like(rewards, dtype=torch.float32)
    if num_sequences:
        with torch.cuda.device_of(rewards):
            ids, order = by_group(group_ids)
            group_advantages[(num_sequences,)](
                rewards, ids, order, lengths, baseline, advantages, num_sequences, eps, KIND=kind, **LAUNCH
            )
    return advantages


_group_advantages.register_kernel("cuda")(launch)
