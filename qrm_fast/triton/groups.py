"""How the kernels over groups of sequences find the members of a group.

One program per sequence, of which the first of each group works for all its members. Up to COMPARED sequences it
compares its group id with the others', which costs no launch; more sequences are sorted by group before, and members
then lie side by side. Both visit members in the order of the sequences: a sum over a group runs in a fixed order,
without atomics. Block sizes have been compiled, not yet timed on a GPU.
"""

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from .search import first_from

COMPARED = 4096
LAUNCH = {"BS": 512, "num_warps": 4}


def by_group(group_ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """Group ids in the order in which the programs have their sequences, and these sequences; None: all in turn."""
    if group_ids.shape[0] <= COMPARED:
        return group_ids, None
    ids, order = group_ids.sort(stable=True)
    return ids, order


@triton.jit
def led_group(ids, order, i, num_sequences, BS: tl.constexpr):
    """Of the i-th sequence: itself, its group, whether that is one, and where its members end if it is the first."""
    i_s = i
    group = tl.load(ids + i).to(tl.int64)
    inside = (group >= 0) & (group < num_sequences)
    if order is not None:
        i_s = tl.load(order + i)
        leads = inside & (tl.load(ids + i - 1, i > 0, -1).to(tl.int64) != group)
        end = first_from(ids, tl.where(leads, num_sequences, 0), group + 1)
    else:
        # backwards: members tend to lie side by side
        later = tl.where(inside, 0, 1)
        begin = i
        while (begin > 0) & (later == 0):
            begin = tl.maximum(begin - BS, 0)
            _, m_earlier = members(ids, order, begin, i, group, BS)
            later = tl.max(m_earlier.to(tl.int32), 0)
        leads = later == 0
        end = i * 0 + num_sequences
    return i_s, group, inside, tl.where(leads, end, i)


@triton.jit
def members(ids, order, begin, end, group, BS: tl.constexpr):
    """The members of a group among the next BS sequences from `begin` on, and which of the block they are."""
    o = begin + tl.arange(0, BS)
    m = o < end
    m = m & (tl.load(ids + o, m, -1).to(tl.int64) == group)
    o_s = o
    if order is not None:
        o_s = tl.load(order + o, m, 0)
    return o_s, m
