"""Triton kernel of clip_delta: one launch; a step finds its sequence by binary search. 8 bytes per step in fp32."""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ..ops.clip_delta import _clip_delta
from .search import sequence_of

LAUNCH = {"BK": 256, "num_warps": 2}


@triton.jit
def clipped(step_rewards, o_k, m_k, eta, CLIP: tl.constexpr):
    """min(r - eta, 0); NaN stays."""
    b_r = tl.load(step_rewards + o_k, m_k, 0.0).to(tl.float64)
    if CLIP:
        b_r = tl.where(b_r - eta > 0.0, 0.0, b_r - eta)
    return b_r


@triton.jit
def clip_delta(
    step_rewards,  # [K]
    step_cu,  # [S+1]
    shaped,  # [K]
    num_steps,
    num_sequences,
    num_halvings,
    eta: tl.float64,
    CLIP: tl.constexpr,
    DELTA: tl.constexpr,
    BK: tl.constexpr,
):
    o_k = tl.program_id(0).to(tl.int64) * BK + tl.arange(0, BK)
    m_k = o_k < num_steps
    b_r = clipped(step_rewards, o_k, m_k, eta, CLIP)
    if DELTA:
        i_s = sequence_of(step_cu, o_k, num_sequences, num_halvings)
        b_remaining = tl.load(step_cu + i_s + 1, m_k, 0).to(tl.int64) - o_k
        b_next = clipped(step_rewards, o_k + 1, o_k + 1 < num_steps, eta, CLIP)
        b_r = tl.where(b_remaining > 1, tl.where(b_remaining > 2, b_r - b_next, b_r), 0.0)
    tl.store(shaped + o_k, b_r.to(tl.float32), m_k)


def launch(step_rewards: Tensor, step_cu: Tensor, eta: float, clip: bool, delta: bool) -> Tensor:
    num_steps, num_sequences = step_rewards.shape[0], step_cu.shape[0] - 1
    shaped = torch.empty_like(step_rewards, dtype=torch.float32)
    if num_steps and num_sequences:
        sizes = num_steps, num_sequences, (num_sequences - 1).bit_length()
        with torch.cuda.device_of(step_rewards):
            clip_delta[(triton.cdiv(num_steps, LAUNCH["BK"]),)](
                step_rewards, step_cu, shaped, *sizes, eta, CLIP=clip, DELTA=delta, **LAUNCH
            )
    return shaped


_clip_delta.register_kernel("cuda")(launch)
