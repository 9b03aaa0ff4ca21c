"""Triton kernels of q_token_rewards: every row is read and written once, the penalty in the same launch.

4 + 4 bytes per row in fp32, 8 more with the KL penalty, 1 with a mask. Re-scoring the last action is a second launch,
one program per sequence, which reads q once more for the mean and writes one row. In float64, rounded once: free beside
memory. Block sizes have been compiled, not yet timed on a GPU.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ..ops.q_token_rewards import _q_token_rewards
from .search import sequence_of

LAUNCH = {"BT": 1024, "num_warps": 4}


@triton.jit
def normalised(b_x, p_stats, min_std, eps, CENTER: tl.constexpr):
    """x / (max(sigma, min_std) + eps), x about its mean if CENTER; 0 where that scale is 0. NaN moments give NaN."""
    variance = tl.load(p_stats + 2) / tl.maximum(tl.load(p_stats), 1.0)
    sigma = tl.sqrt(variance)
    sigma = tl.where(sigma < min_std, min_std, sigma)
    if CENTER:
        b_x -= tl.load(p_stats + 1)
    return tl.where(sigma == 0.0, 0.0, b_x / (sigma + eps))


@triton.jit
def kl_penalty(logprobs, ref_logprobs, o_t, m_t, kl_coef, KL: tl.constexpr):
    b_d = tl.load(logprobs + o_t, m_t, 0.0).to(tl.float64) - tl.load(ref_logprobs + o_t, m_t, 0.0).to(tl.float64)
    if KL == "abs":
        b_kl = tl.abs(b_d)
    elif KL == "k1":
        b_kl = b_d
    elif KL == "k2":
        b_kl = b_d * b_d / 2
    else:
        b_kl = tl.exp(-b_d) - 1.0 + b_d
    return kl_coef * b_kl


@triton.jit(do_not_specialize=["num_sequences", "num_halvings"])
def reward_rows(
    q,  # [T]
    cu_seqlens,  # [S+1]
    stats,  # [1, 3], or [S, 3] if PER_SEQUENCE
    mask,  # [T] or None
    logprobs,  # [T] or None: no penalty
    ref_logprobs,  # [T] or None
    rewards,  # [T]
    num_rows,
    num_sequences,
    num_halvings,
    kl_coef,
    min_std,
    eps,
    PER_SEQUENCE: tl.constexpr,
    CENTER: tl.constexpr,
    KL: tl.constexpr,
    BT: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_t = o_t < num_rows
    m_kept = m_t
    if mask is not None:
        m_kept = m_t & (tl.load(mask + o_t, m_t, 0) != 0)
    i_set = tl.full([], 0, tl.int64)
    if PER_SEQUENCE:
        i_set = sequence_of(cu_seqlens, o_t, num_sequences, num_halvings)
    b_y = normalised(tl.load(q + o_t, m_kept, 0.0).to(tl.float64), stats + i_set * 3, min_std, eps, CENTER)
    if logprobs is not None:
        b_y -= kl_penalty(logprobs, ref_logprobs, o_t, m_kept, kl_coef, KL)
    tl.store(rewards + o_t, tl.where(m_kept, b_y, 0.0).to(tl.float32), m_t)


@triton.jit(do_not_specialize=["num_rows"])
def rescore_last(
    q,
    cu_seqlens,
    stats,
    mask,
    logprobs,
    ref_logprobs,
    rewards,
    num_rows,
    kl_coef,
    min_std,
    eps,
    PER_SEQUENCE: tl.constexpr,
    CENTER: tl.constexpr,
    KL: tl.constexpr,
    BT: tl.constexpr,
):
    """The last kept row of a sequence takes the mean of its kept rows in the place of its own score."""
    i_s = tl.program_id(0).to(tl.int64)
    bos = tl.maximum(tl.load(cu_seqlens + i_s).to(tl.int64), 0)
    eos = tl.minimum(tl.load(cu_seqlens + i_s + 1).to(tl.int64), num_rows)
    i_set = tl.full([], 0, tl.int64)
    if PER_SEQUENCE:
        i_set = i_s
    b_total = tl.zeros([BT], tl.float64)
    b_kept = tl.zeros([BT], tl.float64)
    b_last = tl.full([BT], -1, tl.int64)
    for i_t in range(bos, eos, BT):
        o_t = i_t + tl.arange(0, BT)
        m_kept = o_t < eos
        if mask is not None:
            m_kept = m_kept & (tl.load(mask + o_t, m_kept, 0) != 0)
        b_y = normalised(tl.load(q + o_t, m_kept, 0.0).to(tl.float64), stats + i_set * 3, min_std, eps, CENTER)
        b_total += tl.where(m_kept, b_y, 0.0)
        b_kept += tl.where(m_kept, 1.0, 0.0)
        b_last = tl.where(m_kept, o_t, b_last)
    i_last = tl.max(b_last, 0)
    m_last = i_last >= 0
    average = tl.sum(b_total, 0) / tl.maximum(tl.sum(b_kept, 0), 1.0)
    if logprobs is not None:
        average -= kl_penalty(logprobs, ref_logprobs, i_last, m_last, kl_coef, KL)
    tl.store(rewards + i_last, average.to(tl.float32), m_last)


def launch(
    q: Tensor,
    cu_seqlens: Tensor,
    stats: Tensor,
    mask: Tensor | None,
    center: bool,
    rescore: bool,
    logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    kl_coef: float,
    kl_estimator: str,
    min_std: float,
    eps: float,
) -> Tensor:
    num_rows, num_sequences = q.shape[0], cu_seqlens.shape[0] - 1
    rewards = torch.empty_like(q, dtype=torch.float32)
    if num_rows and num_sequences:
        tensors = q, cu_seqlens, stats, mask, logprobs, ref_logprobs, rewards
        scalars = kl_coef, min_std, eps
        options = dict(PER_SEQUENCE=stats.shape[0] > 1, CENTER=center, KL=kl_estimator, **LAUNCH)
        with torch.cuda.device_of(q):
            reward_rows[(triton.cdiv(num_rows, LAUNCH["BT"]),)](
                *tensors, num_rows, num_sequences, (num_sequences - 1).bit_length(), *scalars, **options
            )
            if rescore:
                rescore_last[(num_sequences,)](*tensors, num_rows, *scalars, **options)
    return rewards


_q_token_rewards.register_kernel("cuda")(launch)
