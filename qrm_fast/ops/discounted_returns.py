"""Discounted returns over packed sequences."""

import torch
from torch import Tensor

from .checks import BOOL, FLOATS, INTS, Checker
from .constant_op import constant_op
from .dtypes import acc_dtype
from .segments import rows_from_the_end


def discounted_returns(
    rewards: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    bootstrap: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Return of every row of every packed sequence, [T] float32 (float64 for float64), in one reverse pass.

    `rewards`: [T] floating, one row per action. `cu_seqlens`: [S+1] int32 or int64. `bootstrap`: [S] in the result's
    dtype, the return after each sequence's last action (None: 0, the episode ended). `mask`: [T] bool; rows where it
    is False (tool output, observations) carry the return through, undiscounted, and give 0.

        R_t = r_t + gamma R_{t+1}

    with t+1 the sequence's next unmasked row (Sutton and Barto, Reinforcement Learning, eq. 3.9). Not differentiable.
    NaN and infinities reach the rows that they reach in this recurrence, and those of no other sequence.

    Raises TypeError or ValueError for a wrong dtype, shape or device, and, on CPU, ValueError where cu_seqlens do
    not start at 0, decrease, or do not end at T; on CUDA every row is then NaN.
    """
    check = Checker()
    check("rewards", rewards, "T", FLOATS)
    check("cu_seqlens", cu_seqlens, "S+1", INTS)
    if bootstrap is not None:
        check("bootstrap", bootstrap, "S", (acc_dtype(rewards.dtype),))
    if mask is not None:
        check("mask", mask, "T", BOOL)
    return _discounted_returns(rewards, cu_seqlens, float(gamma), bootstrap, mask)


@constant_op("discounted_returns")
def _discounted_returns(
    rewards: Tensor, cu_seqlens: Tensor, gamma: float, bootstrap: Tensor | None, mask: Tensor | None
) -> Tensor:
    r = rewards.to(acc_dtype(rewards.dtype))
    returns = torch.zeros_like(r)
    for s, rows in rows_from_the_end(cu_seqlens, mask):
        later = r.new_zeros(()) if bootstrap is None else bootstrap[s]
        for t in rows:
            returns[t] = later = r[t] + gamma * later
    return returns


@_discounted_returns.register_fake
def _(rewards, cu_seqlens, gamma, bootstrap, mask):
    return torch.empty_like(rewards, dtype=acc_dtype(rewards.dtype))
