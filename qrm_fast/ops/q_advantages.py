"""Advantages with a Q-RM in the place of GAE: normalised token scores minus the scaled values of a critic."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import Checker
from .constant_op import constant_op
from .dtypes import acc_dtype
from .gae import Advantages
from .moments import moments
from .q_token_rewards import _q_token_rewards, check_rewards


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
    check = Checker()
    options: dict[str, Any] = dict(
        mask=mask, scope=scope, group_ids=group_ids, eos_rescore=eos_rescore, kl_coef=kl_coef
    )
    options |= dict(kl_estimator=kl_estimator, logprobs=logprobs, ref_logprobs=ref_logprobs, min_std=min_std, eps=eps)
    check_rewards(check, q, cu_seqlens, process_group=process_group, **options)
    if values is not None:
        check("values", values, "T", (q.dtype,))
    if kl_coef == 0:
        logprobs = ref_logprobs = None
    stats = value_stats = None
    if scope != "sequence":
        bounds = None if scope == "batch" else cu_seqlens
        stats = moments(q, mask, bounds, group_ids, process_group)
        if values is not None and value_normalize:
            value_stats = moments(values, mask, bounds, group_ids, process_group)
    return Advantages(
        *_q_advantages(
            q,
            values,
            cu_seqlens,
            stats,
            value_stats,
            mask,
            float(value_coef),
            bool(value_normalize),
            bool(center),
            eos_rescore == "mean",
            logprobs,
            ref_logprobs,
            float(kl_coef),
            kl_estimator,
            float(min_std),
            float(eps),
        )
    )


@constant_op("q_advantages", on_every_device=True)
def _q_advantages(
    q: Tensor,
    values: Tensor | None,
    cu_seqlens: Tensor,
    stats: Tensor | None,
    value_stats: Tensor | None,
    mask: Tensor | None,
    value_coef: float,
    value_normalize: bool,
    center: bool,
    rescore_last: bool,
    logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    kl_coef: float,
    kl_estimator: str,
    min_std: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Without statistics each sequence has its own."""
    stats = moments(q, mask, cu_seqlens) if stats is None else stats
    penalty = logprobs, ref_logprobs, kl_coef, kl_estimator
    returns = _q_token_rewards(q, cu_seqlens, stats, mask, center, rescore_last, *penalty, min_std, eps)
    if values is None:
        return returns.clone(), returns
    if value_normalize:
        value_stats = moments(values, mask, cu_seqlens) if value_stats is None else value_stats
        v = _q_token_rewards(values, cu_seqlens, value_stats, mask, False, False, None, None, 0.0, "abs", 0.0, eps)
    else:
        v = values.to(returns.dtype, copy=True) if mask is None else values.to(returns.dtype).where(mask, 0.0)
    v.mul_(value_coef)
    return torch.sub(returns, v, out=v), returns


@_q_advantages.register_fake
def _(q, values, cu_seqlens, *options):
    acc = acc_dtype(q.dtype)
    return torch.empty_like(q, dtype=acc), torch.empty_like(q, dtype=acc)
