"""Triton kernel of prm_rewards: one launch for the two logits of every step and its reward, 12 bytes in fp32."""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ..ops.prm_rewards import _prm_rewards
from .logits import tanh

LAUNCH = {"BK": 256, "num_warps": 2}


@triton.jit
def prm_rewards(
    logits,  # [K, 2]
    rewards,  # [K]
    stride,
    num_steps,
    BK: tl.constexpr,
):
    o_k = tl.program_id(0).to(tl.int64) * BK + tl.arange(0, BK)
    m_k = o_k < num_steps
    b_wrong = tl.load(logits + o_k * stride, m_k, 0.0).to(tl.float64)
    b_right = tl.load(logits + o_k * stride + 1, m_k, 0.0).to(tl.float64)
    tl.store(rewards + o_k, tanh((b_right - b_wrong) / 2).to(tl.float32), m_k)


def launch(logits: Tensor) -> Tensor:
    num_steps = logits.shape[0]
    rewards = logits.new_empty(num_steps, dtype=torch.float32)
    if num_steps:
        with torch.cuda.device_of(logits):
            prm_rewards[(triton.cdiv(num_steps, LAUNCH["BK"]),)](logits, rewards, logits.stride(0), num_steps, **LAUNCH)
    return rewards


_prm_rewards.register_kernel("cuda")(launch)
