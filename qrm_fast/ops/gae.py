"""Generalised advantage estimation over packed sequences."""

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import BOOL, FLOATS, INTS, Checker
from .constant_op import constant_op
from .dtypes import acc_dtype
from .segments import rows_from_the_end


class Advantages(NamedTuple):
    advantages: Tensor  # [T] float32
    returns: Tensor  # [T] float32


def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    bootstrap: Tensor | None = None,
    mask: Tensor | None = None,
) -> Advantages:
    """Advantages and TD(lambda) targets of every packed sequence, in one reverse pass.

    `rewards`, `values`: [T] floating, one row per action. `cu_seqlens`: [S+1] int32 or int64. `lam`: a number, or
    [S] per sequence. `bootstrap`: [S], the value after each sequence's last action (None: 0, the episode ended).
    `mask`: [T] bool; rows where it is False (tool output, observations) carry the recurrence through and give 0.

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}        returns_t = A_t + V_t

    with t+1 the sequence's next unmasked row (Schulman et al., arXiv 1506.02438, eq. 16). Both results are [T]
    float32 (float64 for float64). Not differentiable. `lam` and `bootstrap` tensors have the results' dtype.
    NaN and infinities reach the rows that they reach in this recurrence, and those of no other sequence.

    Raises TypeError or ValueError for a wrong dtype, shape or device, and, on CPU, ValueError where cu_seqlens do
    not start at 0, decrease, or do not end at T; on CUDA every row is then NaN.
    """
    check = Checker()
    check("rewards", rewards, "T", FLOATS)
    check("values", values, "T", (rewards.dtype,))
    check("cu_seqlens", cu_seqlens, "S+1", INTS)
    acc = acc_dtype(rewards.dtype)
    if isinstance(lam, Tensor):
        check("lam", lam, "S", (acc,))
    if bootstrap is not None:
        check("bootstrap", bootstrap, "S", (acc,))
    if mask is not None:
        check("mask", mask, "T", BOOL)
    lam, lam_per_sequence = (1.0, lam) if isinstance(lam, Tensor) else (float(lam), None)
    return Advantages(*_gae(rewards, values, cu_seqlens, float(gamma), lam, lam_per_sequence, bootstrap, mask))


@constant_op("gae")
def _gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    gamma: float,
    lam: float,
    lam_per_sequence: Tensor | None,
    bootstrap: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    acc = acc_dtype(rewards.dtype)
    r, v = rewards.to(acc), values.to(acc)
    advantages, returns = torch.zeros_like(r), torch.zeros_like(r)
    for s, rows in rows_from_the_end(cu_seqlens, mask):
        lam_s = lam if lam_per_sequence is None else lam_per_sequence[s]
        advantage = r.new_zeros(())
        next_value = advantage if bootstrap is None else bootstrap[s]
        for t in rows:
            advantage = r[t] + gamma * next_value - v[t] + gamma * lam_s * advantage
            next_value = v[t]
            advantages[t], returns[t] = advantage, advantage + v[t]
    return advantages, returns


@_gae.register_fake
def _(rewards, values, cu_seqlens, gamma, lam, lam_per_sequence, bootstrap, mask):
    acc = acc_dtype(rewards.dtype)
    return torch.empty_like(rewards, dtype=acc), torch.empty_like(rewards, dtype=acc)
