"""Token rewards from Q-RM scores: normalise, re-score the last action, subtract a KL penalty, mask."""

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import BOOL, FLOATS, INTS, Checker
from .constant_op import constant_op
from .dtypes import acc_dtype
from .moments import moments
from .segments import sequence_ids, sequence_sum

SCOPES = ("batch", "sequence", "group")
EOS_RESCORES = ("none", "mean")
KL_ESTIMATORS = ("abs", "k1", "k2", "k3")


def q_token_rewards(
    q: Tensor,
    cu_seqlens: Tensor,
    *,
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
) -> Tensor:
    """The reward of every action, [T] float32 (float64 for float64), from its Q-RM score.

    `q`: [T] floating. `cu_seqlens`: [S+1] int32 or int64. `mask`: [T] bool; rows where it is False count nowhere and
    give 0. `group_ids`: [S] int32 or int64 in [0, S), for scope "group". `logprobs`, `ref_logprobs`: [T] of the
    result's dtype. In this order, as the released code does (Q-RM, arXiv 2505.23363, buffer of homzer/Q-RM):

        y_t = (q_t - mu if center else q_t) / (max(sigma, min_std) + eps)
        y_last = mean of y over the sequence, y_last itself included        if eos_rescore is "mean"
        r_t = y_t - kl_coef * KL_t,   d = logprobs_t - ref_logprobs_t:
              KL_t = |d| (abs), d (k1), d^2/2 (k2) or exp(-d) - 1 + d (k3)

    mu and the population standard deviation sigma are those of the scope: the batch, joined over the ranks of
    `process_group` if given, or each sequence, or each group. Where sigma and min_std are both 0, y is 0. A row that is
    not finite is left out of mu and sigma and shows in its own sequence only. Not differentiable.

    Raises TypeError or ValueError for a wrong dtype, shape or device, for an unknown option or options that do not go
    together, and, on CPU, ValueError where cu_seqlens do not start at 0, decrease, or do not end at T, or a group id is
    out of range (on CUDA its sequence is NaN).
    """
    check = Checker()
    check("q", q, "T", FLOATS)
    check("cu_seqlens", cu_seqlens, "S+1", INTS)
    if mask is not None:
        check("mask", mask, "T", BOOL)
    for name, value, known in (
        ("scope", scope, SCOPES),
        ("eos_rescore", eos_rescore, EOS_RESCORES),
        ("kl_estimator", kl_estimator, KL_ESTIMATORS),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if (group_ids is not None) != (scope == "group"):
        given = "None" if group_ids is None else "a tensor"
        raise ValueError(f"group_ids must be given for scope 'group' only, got {given} for {scope!r}")
    if group_ids is not None:
        check("group_ids", group_ids, "S", INTS)
    if process_group is not None and scope != "batch":
        raise ValueError(f"process_group joins the statistics of scope 'batch' only, got {scope!r}")
    if not min_std >= 0 or not eps >= 0:
        raise ValueError(f"min_std and eps must be >= 0, got {min_std} and {eps}")
    acc = acc_dtype(q.dtype)
    for name, x in ("logprobs", logprobs), ("ref_logprobs", ref_logprobs):
        if x is not None:
            check(name, x, "T", (acc,))
        elif kl_coef != 0:
            raise ValueError(f"{name} must be given for kl_coef = {kl_coef}, got None")
    if kl_coef == 0:
        logprobs = ref_logprobs = None
    stats = moments(q, mask, None if scope == "batch" else cu_seqlens, group_ids, process_group)
    return _q_token_rewards(
        q,
        cu_seqlens,
        stats,
        mask,
        bool(center),
        eos_rescore == "mean",
        logprobs,
        ref_logprobs,
        float(kl_coef),
        kl_estimator,
        float(min_std),
        float(eps),
    )


@constant_op("q_token_rewards")
def _q_token_rewards(
    q: Tensor,
    cu_seqlens: Tensor,
    stats: Tensor,
    mask: Tensor | None,
    center: bool,
    rescore_last: bool,
    logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    kl_coef: float,
    kl_estimator: str,
    min_std: float,
    eps: float,
) -> Tensor:
    num_tokens = q.shape[0]
    counted = torch.ones_like(q, dtype=torch.bool) if mask is None else mask
    i_seq = sequence_ids(cu_seqlens, num_tokens)
    count, mean, m2 = stats.expand(cu_seqlens.shape[0] - 1, 3)[i_seq].unbind(1)  # [T] each
    sigma = (m2 / count.clamp(min=1)).sqrt().clamp(min=min_std)
    y = q.double() - mean if center else q.double()
    y = (y / (sigma + eps)).where(sigma != 0, 0.0).where(counted, 0.0)
    if rescore_last:
        rank = torch.cat([counted.new_zeros(1, dtype=torch.int64), counted.cumsum(0)])  # counted rows before row t
        start, end = rank[cu_seqlens[:-1]], rank[cu_seqlens[1:]]
        row_mean = sequence_sum(y, cu_seqlens) / (end - start).clamp(min=1)
        y = row_mean[i_seq].where(rank[1:] == end[i_seq], y)
    if logprobs is not None and ref_logprobs is not None:
        d = logprobs.double() - ref_logprobs.double()
        kl = {"abs": d.abs(), "k1": d, "k2": d.square() / 2, "k3": torch.expm1(-d) + d}[kl_estimator]
        y = y - kl_coef * kl
    return y.where(counted, 0.0).to(acc_dtype(q.dtype))


@_q_token_rewards.register_fake
def _(q, cu_seqlens, stats, mask, center, rescore_last, logprobs, ref_logprobs, kl_coef, kl_estimator, min_std, eps):
    return torch.empty_like(q, dtype=acc_dtype(q.dtype))
