"""Rewards that a trainer placed where the policy is not trained."""

import torch
from torch import Tensor

from ..ops.checks import BOOL, FLOATS, INTS, Checker
from ..ops.segments import ascending, sequence_ids


def onto_trainable(rewards: Tensor, cu_seqlens: Tensor, mask: Tensor) -> Tensor:
    """Rewards of rows that are not trained on, moved to the last trainable row before them: [T], rewards' dtype.

    `rewards`: [T] floating. `cu_seqlens`: [S+1] int32 or int64. `mask`: [T] bool, True where the policy is trained.

    An answer that ends in tool output has its terminal reward on a row that the mask hides, and `gae` passes over that
    row: the reward would be lost. Here it joins the action that led to it, as does a reward for what an action brought
    about. A reward before the first trainable row of its sequence belongs to no action and is dropped. KL penalties of
    rows that are not trained on are no rewards: leave them out before. Padded [B, L] are B sequences of L rows.

    Raises TypeError or ValueError for a wrong dtype, shape or device.
    """
    check = Checker()
    check("rewards", rewards, "T", FLOATS)
    check("cu_seqlens", cu_seqlens, "S+1", INTS)
    check("mask", mask, "T", BOOL)
    num_rows = len(rewards)
    rows = torch.arange(num_rows, device=rewards.device)
    owner = rows.where(mask, -1).cummax(0).values if num_rows else rows  # the last trainable row so far
    first = ascending(cu_seqlens, num_rows)[sequence_ids(cu_seqlens, num_rows)]
    owned = owner >= first
    # Adding by index is deterministic on CUDA, too: it sorts.
    return torch.zeros_like(rewards).index_put((owner.clamp(min=0),), rewards.where(owned, 0.0), accumulate=True)
