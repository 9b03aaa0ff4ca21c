"""Triton kernel of progress_rewards: one launch; a step finds its sequence by binary search. 8 bytes a step in fp32."""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ..ops.progress_rewards import _progress_rewards
from .search import sequence_of

LAUNCH = {"BK": 256, "num_warps": 2}


@triton.jit
def progress_rewards(
    values_after,  # [K]
    start_values,  # [S]
    step_cu,  # [S+1]
    rewards,  # [K]
    num_steps,
    num_sequences,
    num_halvings,
    alpha: tl.float64,
    BK: tl.constexpr,
):
    o_k = tl.program_id(0).to(tl.int64) * BK + tl.arange(0, BK)
    m_k = o_k < num_steps
    i_s = sequence_of(step_cu, o_k, num_sequences, num_halvings)
    m_first = m_k & (tl.load(step_cu + i_s, m_k, 0).to(tl.int64) == o_k)
    b_start = tl.load(start_values + i_s, m_first, 0.0).to(tl.float64)
    b_before = tl.load(values_after + o_k - 1, m_k & ~m_first & (o_k > 0), 0.0).to(tl.float64)
    b_after = tl.load(values_after + o_k, m_k, 0.0).to(tl.float64)
    b_progress = alpha * (b_after - tl.where(m_first, b_start, b_before))
    tl.store(rewards + o_k, b_progress.to(tl.float32), m_k)


def launch(values_after: Tensor, start_values: Tensor, step_cu: Tensor, alpha: float) -> Tensor:
    num_steps, num_sequences = values_after.shape[0], start_values.shape[0]
    rewards = torch.empty_like(values_after, dtype=torch.float32)
    if num_steps and num_sequences:
        sizes = num_steps, num_sequences, (num_sequences - 1).bit_length()
        with torch.cuda.device_of(values_after):
            progress_rewards[(triton.cdiv(num_steps, LAUNCH["BK"]),)](
                values_after, start_values, step_cu, rewards, *sizes, alpha, **LAUNCH
            )
    return rewards


_progress_rewards.register_kernel("cuda")(launch)
