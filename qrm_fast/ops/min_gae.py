"""Min-form lambda returns over packed sequences: credit for the worst step still to come."""

import torch
from torch import Tensor

from .checks import BOOL, FLOATS, INTS, Checker
from .constant_op import constant_op
from .dtypes import acc_dtype
from .gae import Advantages
from .segments import rows_from_the_end


def min_gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    lam: float = 0.95,
    bootstrap: Tensor | None = None,
    mask: Tensor | None = None,
) -> Advantages:
    """Advantages and lambda targets where a return is the minimum, not the sum, of the rewards to come.

    `rewards`, `values`: [T] floating, one row per action; a row without a step reward holds +inf. `cu_seqlens`:
    [S+1] int32 or int64. `lam`: in [0, 1]. `bootstrap`: [S] in the results' dtype, the value after each sequence's
    last action (None: the episode ended, the last row's return is its reward). `mask`: [T] bool; rows where it is
    False (tool output, observations) carry the recurrence through and give 0.

        Q_t = min(r_t, (1 - lam) V_{t+1} + lam Q_{t+1})        last row: Q = min(r, bootstrap)
        advantages_t = Q_t - V_t        returns_t = Q_t

    with t+1 the sequence's next unmasked row. With lam = 1 it is the strict minimum of PURE (arXiv 2504.15275, its
    reverse cumulative form); smaller lam trusts the critic. With lam = 0 the second term is dropped, also where it is
    infinite. Behind the last step reward Q and the advantage are +inf. Both results are [T] float32 (float64 for
    float64). Not differentiable. A NaN reaches every row before it, as in torch.minimum, and no other sequence.

    Raises TypeError or ValueError for a wrong dtype, shape or device, ValueError for a lam outside [0, 1], and, on
    CPU, ValueError where cu_seqlens do not start at 0, decrease, or do not end at T; on CUDA every row is then NaN.
    """
    check = Checker()
    check("rewards", rewards, "T", FLOATS)
    check("values", values, "T", (rewards.dtype,))
    check("cu_seqlens", cu_seqlens, "S+1", INTS)
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must be in [0, 1], got {lam}")
    if bootstrap is not None:
        check("bootstrap", bootstrap, "S", (acc_dtype(rewards.dtype),))
    if mask is not None:
        check("mask", mask, "T", BOOL)
    return Advantages(*_min_gae(rewards, values, cu_seqlens, float(lam), bootstrap, mask))


@constant_op("min_gae")
def _min_gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    lam: float,
    bootstrap: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    acc = acc_dtype(rewards.dtype)
    r, v = rewards.to(acc), values.to(acc)
    advantages, returns = torch.zeros_like(r), torch.zeros_like(r)
    for s, rows in rows_from_the_end(cu_seqlens, mask):
        ahead = r.new_tensor(torch.inf) if bootstrap is None else bootstrap[s]
        for t in rows:
            q = torch.minimum(r[t], ahead)
            ahead = (1 - lam) * v[t] + (lam * q if lam else 0)
            advantages[t], returns[t] = q - v[t], q
    return advantages, returns


@_min_gae.register_fake
def _(rewards, values, cu_seqlens, lam, bootstrap, mask):
    acc = acc_dtype(rewards.dtype)
    return torch.empty_like(rewards, dtype=acc), torch.empty_like(rewards, dtype=acc)
