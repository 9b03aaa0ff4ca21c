"""Triton kernel of implicit_rewards: one read of both log-probabilities and one write, 12 bytes per token in fp32."""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ..ops.implicit_rewards import _implicit_rewards

LAUNCH = {"BT": 1024, "num_warps": 4}


@triton.jit
def implicit_rewards(
    logprobs,  # [T]
    ref_logprobs,  # [T]
    rewards,  # [T]
    num_rows,
    beta: tl.float64,
    BT: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_t = o_t < num_rows
    b_ratio = tl.load(logprobs + o_t, m_t, 0.0).to(tl.float64) - tl.load(ref_logprobs + o_t, m_t, 0.0).to(tl.float64)
    tl.store(rewards + o_t, (beta * b_ratio).to(tl.float32), m_t)


def launch(logprobs: Tensor, ref_logprobs: Tensor, beta: float) -> Tensor:
    num_rows = logprobs.shape[0]
    rewards = torch.empty_like(logprobs, dtype=torch.float32)
    if num_rows:
        with torch.cuda.device_of(logprobs):
            implicit_rewards[(triton.cdiv(num_rows, LAUNCH["BT"]),)](
                logprobs, ref_logprobs, rewards, num_rows, beta, **LAUNCH
            )
    return rewards


_implicit_rewards.register_kernel("cuda")(launch)
