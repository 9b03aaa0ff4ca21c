"""Triton kernel of informative_groups: the first sequence of each group compares its rewards and marks all members.

One launch: a group is read twice from L2, some 12 bytes per sequence each, and a byte is written per sequence.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ..ops.informative_groups import _informative_groups
from .groups import LAUNCH, by_group, led_group, members


@triton.jit
def informative_groups(
    rewards,  # [S]
    ids,  # [S], of by_group
    order,  # [S] or None
    informative,  # [S]
    num_sequences,
    BS: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    i_s, group, inside, end = led_group(ids, order, i, num_sequences, BS)
    tl.store(informative + i_s, False, ~inside)

    infinity = float("inf")
    b_low = tl.full([BS], infinity, tl.float32)
    b_high = tl.full([BS], -infinity, tl.float32)
    for begin in range(i, end, BS):
        o_s, m_s = members(ids, order, begin, end, group, BS)
        b_r = tl.load(rewards + o_s, m_s, 0.0).to(tl.float32)
        m_s = m_s & (b_r - b_r == 0.0)
        b_low = tl.where(m_s, tl.minimum(b_low, b_r), b_low)
        b_high = tl.where(m_s, tl.maximum(b_high, b_r), b_high)
    gap = tl.max(b_high, 0) - tl.min(b_low, 0)

    for begin in range(i, end, BS):
        o_s, m_s = members(ids, order, begin, end, group, BS)
        b_r = tl.load(rewards + o_s, m_s, 0.0).to(tl.float32)
        tl.store(informative + o_s, b_r - b_r + gap > 0.0, m_s)  # not where the reward is NaN or infinite


def launch(rewards: Tensor, group_ids: Tensor) -> Tensor:
    num_sequences = rewards.shape[0]
    informative = torch.empty_like(rewards, dtype=torch.bool)
    if num_sequences:
        with torch.cuda.device_of(rewards):
            ids, order = by_group(group_ids)
            informative_groups[(num_sequences,)](rewards, ids, order, informative, num_sequences, **LAUNCH)
    return informative


_informative_groups.register_kernel("cuda")(launch)
