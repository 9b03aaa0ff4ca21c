"""Advantages with a Q-RM in the place of GAE: normalised token scores minus the scaled values of a critic."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import FLOATS, Checker
from .gae import Advantages
from .q_token_rewards import _q_token_rewards, q_token_rewards


def q_advantages(
    q: Tensor,
    values: Tensor | None,
    cu_seqlens: Tensor,
    *,
    value_coef: float = 0.01,
    value_normalize: bool = True,
    mask: Tensor | None = None,
    center: bool = False,
    scope: str = "batch",
    group_ids: Tensor | None = None,
    eos_rescore: str = "none",
    kl_coef: float = 0.0,
    kl_estimator: str = "abs",
    logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    min_std: float = 0.0,
    eps: float = 1e-8,
    process_group: dist.ProcessGroup | None = None,
) -> Advantages:
    """PPO's advantages and critic targets from Q-RM scores, without GAE.

    `q`: [T] floating. `values`: [T] of q's dtype, the critic's V(s_t), or None for none. `cu_seqlens`: [S+1] int32 or
    int64. All other options are those of `q_token_rewards`.

        returns_t = q_token_rewards(q)_t        A_t = returns_t - value_coef * V_t / (sigma_V + eps)

    sigma_V is the population standard deviation of the values over the same rows and scope as that of q, and the
    quotient is 0 where sigma_V is 0; with value_normalize False V_t itself is subtracted (Q-RM, arXiv 2505.23363: the
    released code normalises with coefficient 0.01, Algorithm 1 subtracts V with coefficient 1). Both results are [T]
    float32 (float64 for float64). Not differentiable.

    Raises as `q_token_rewards` does, and TypeError or ValueError for values of a wrong dtype, shape or device.
    """
    rows: dict[str, Any] = dict(mask=mask, scope=scope, group_ids=group_ids, eps=eps, process_group=process_group)
    penalty: dict[str, Any] = dict(
        kl_coef=kl_coef, kl_estimator=kl_estimator, logprobs=logprobs, ref_logprobs=ref_logprobs
    )
    returns = q_token_rewards(q, cu_seqlens, center=center, eos_rescore=eos_rescore, min_std=min_std, **penalty, **rows)
    if values is None:
        return Advantages(returns.clone(), returns)
    check = Checker()
    check("q", q, "T", FLOATS)
    check("values", values, "T", (q.dtype,))
    if value_normalize:
        v = q_token_rewards(values, cu_seqlens, **rows)
    else:
        unit = values.new_ones(1, 3, dtype=torch.float64)  # the moments of a sigma of 1
        v = _q_token_rewards(values, cu_seqlens, unit, mask, False, False, None, None, 0.0, "abs", 0.0, 0.0)
    return Advantages(v.mul_(-value_coef).add_(returns), returns)
