"""V-trace over packed sequences."""

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import BOOL, FLOATS, INTS, Checker
from .constant_op import constant_op
from .dtypes import acc_dtype
from .segments import rows_from_the_end


class VTrace(NamedTuple):
    targets: Tensor  # [T] float32
    advantages: Tensor  # [T] float32


def vtrace(
    rewards: Tensor,
    values: Tensor,
    ratios: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    bootstrap: Tensor | None = None,
    mask: Tensor | None = None,
) -> VTrace:
    """Value targets and policy-gradient advantages of off-policy sequences, in one reverse pass.

    `rewards`, `values`, `ratios`: [T] floating, one dtype, one row per action; `ratios` are pi(a|s) / mu(a|s) >= 0 of
    the policy over the one that sampled. `cu_seqlens`: [S+1] int32 or int64. `bootstrap`: [S] in the results' dtype,
    the value after each sequence's last action (None: 0, the episode ended). `mask`: [T] bool; rows where it is False
    (tool output, observations) carry the recurrence through and give 0.

        rho_t = min(rho_bar, ratio_t)        c_t = lam min(c_bar, ratio_t)
        A_t = rho_t (r_t + gamma V_{t+1} - V_t) + gamma c_t A_{t+1}
        targets_t = V_t + A_t                advantages_t = rho_t (r_t + gamma targets_{t+1} - V_t)

    with t+1 the sequence's next unmasked row (IMPALA, arXiv 1802.01561, eq. 1 and section 4.2; lam: its remark 2).
    Behind the last row, V and its target are `bootstrap`. Both results are [T] float32 (float64 for float64). Not
    differentiable. NaN and infinities reach the rows that they reach in this recurrence, and those of no other
    sequence.

    Raises TypeError or ValueError for a wrong dtype, shape or device, and, on CPU, ValueError where cu_seqlens do
    not start at 0, decrease, or do not end at T; on CUDA every row is then NaN.
    """
    check = Checker()
    check("rewards", rewards, "T", FLOATS)
    check("values", values, "T", (rewards.dtype,))
    check("ratios", ratios, "T", (rewards.dtype,))
    check("cu_seqlens", cu_seqlens, "S+1", INTS)
    if bootstrap is not None:
        check("bootstrap", bootstrap, "S", (acc_dtype(rewards.dtype),))
    if mask is not None:
        check("mask", mask, "T", BOOL)
    bars = float(rho_bar), float(c_bar)
    return VTrace(*_vtrace(rewards, values, ratios, cu_seqlens, float(gamma), float(lam), *bars, bootstrap, mask))


@constant_op("vtrace")
def _vtrace(
    rewards: Tensor,
    values: Tensor,
    ratios: Tensor,
    cu_seqlens: Tensor,
    gamma: float,
    lam: float,
    rho_bar: float,
    c_bar: float,
    bootstrap: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    acc = acc_dtype(rewards.dtype)
    r, v, ratio = rewards.to(acc), values.to(acc), ratios.to(acc)
    rho, c = ratio.clamp(max=rho_bar), lam * ratio.clamp(max=c_bar)
    targets, advantages = torch.zeros_like(r), torch.zeros_like(r)
    for s, rows in rows_from_the_end(cu_seqlens, mask):
        correction = r.new_zeros(())
        next_value = next_target = correction if bootstrap is None else bootstrap[s]
        for t in rows:
            advantages[t] = rho[t] * (r[t] + gamma * next_target - v[t])
            correction = rho[t] * (r[t] + gamma * next_value - v[t]) + gamma * c[t] * correction
            next_value = v[t]
            targets[t] = next_target = v[t] + correction
    return targets, advantages


@_vtrace.register_fake
def _(rewards, values, ratios, cu_seqlens, gamma, lam, rho_bar, c_bar, bootstrap, mask):
    acc = acc_dtype(rewards.dtype)
    return torch.empty_like(rewards, dtype=acc), torch.empty_like(rewards, dtype=acc)
