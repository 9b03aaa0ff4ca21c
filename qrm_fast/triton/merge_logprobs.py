"""Triton kernel of merge_logprobs: softmax statistics of R shards into log-probability, entropy and log-partition.

Reads 16 R bytes per row once and writes 12; shards are merged in their order, so the bits are the same every time.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ..ops.merge_logprobs import _merge_logprobs
from .linear_logprobs import merged
from .logits import MERGE


@triton.jit
def merge_logprobs(
    maxima,  # [R, T]
    sums,  # [R, T]
    weighteds,  # [R, T]
    target_logits,  # [R, T]
    logprobs,  # [T]
    entropy,  # [T]
    lse,  # [T]
    stride_maxima,
    stride_sums,
    stride_weighteds,
    stride_target_logits,
    num_rows,
    num_shards,
    BT: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_t = o_t < num_rows
    b_max = tl.full([BT], float("-inf"), tl.float32)
    b_sum = tl.zeros([BT], tl.float32)
    b_weighted = tl.zeros([BT], tl.float32)
    b_target = tl.zeros([BT], tl.float32)
    b_holders = tl.zeros([BT], tl.int32)
    p_max, p_sum, p_weighted, p_target = maxima + o_t, sums + o_t, weighteds + o_t, target_logits + o_t
    for _ in range(0, num_shards):
        b_max2 = tl.load(p_max, m_t, 0.0)
        b_sum2 = tl.load(p_sum, m_t, 0.0)
        b_weighted2 = tl.load(p_weighted, m_t, 0.0)
        b_max, b_sum, b_weighted = merged(b_max, b_sum, b_weighted, b_max2, b_sum2, b_weighted2)
        b_logit = tl.load(p_target, m_t, 0.0)
        m_held = b_logit == b_logit
        b_target = tl.where(m_held, b_logit, b_target)
        b_holders += m_held.to(tl.int32)
        p_max, p_sum = p_max + stride_maxima, p_sum + stride_sums
        p_weighted, p_target = p_weighted + stride_weighteds, p_target + stride_target_logits
    b_log_sum = tl.log(b_sum)
    b_logprob = (b_target - b_max) - b_log_sum
    b_entropy = b_log_sum - b_weighted / b_sum
    results = (tl.where(b_logprob > 0, 0.0, b_logprob), tl.where(b_entropy < 0, 0.0, b_entropy), b_max + b_log_sum)
    outputs = (logprobs, entropy, lse)
    m_nothing = (b_sum == 0) & (b_holders == 0)
    for i in tl.static_range(3):
        b = tl.where(m_nothing, 0.0, tl.where(b_holders == 1, results[i], float("nan")))
        tl.store(outputs[i] + o_t, b, m_t)


def forward(max: Tensor, sumexp: Tensor, sum_z_exp: Tensor, target_logit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    num_shards, num_rows = max.shape
    logprobs, entropy, lse = (max.new_empty(num_rows) for _ in range(3))
    if num_rows:
        fields = max, sumexp, sum_z_exp, target_logit
        with torch.cuda.device_of(max):
            merge_logprobs[(triton.cdiv(num_rows, MERGE["BT"]),)](
                *fields, logprobs, entropy, lse, *(x.stride(0) for x in fields), num_rows, num_shards, **MERGE
            )
    return logprobs, entropy, lse


_merge_logprobs.register_kernel("cuda")(forward)
