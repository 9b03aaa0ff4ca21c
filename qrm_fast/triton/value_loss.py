"""Triton kernels of value_loss: a critic's squared error and its derivative in one pass.

Reads each row's tensors once and writes the derivative, 12 bytes per token in fp32, 20 with clip and weights. Each
program sums its rows in float64 and keeps the sum; a second launch adds those in their order: no atomics, the same bits
every time. Block sizes have been compiled, not yet timed on a GPU.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ..ops.value_loss import _value_loss

ROWS = {"BT": 1024, "num_warps": 4}
SUM = {"BT": 1024, "num_warps": 4}


@triton.jit
def value_loss_rows(
    values,  # [T]
    returns,  # [T]
    old_values,  # [T] or None
    token_weights,  # [T] or None: mean_weight
    derivative,  # [T]
    sums,  # [programs], float64
    num_rows,
    mean_weight,
    clip,
    BT: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    o_t = i_b * BT + tl.arange(0, BT)
    m_t = o_t < num_rows
    b_weight = tl.full([BT], 0.0, tl.float32) + mean_weight
    if token_weights is not None:
        b_weight = tl.load(token_weights + o_t, m_t, 0.0)
    m_t = m_t & (b_weight != 0)
    b_value = tl.load(values + o_t, m_t, 0.0).to(tl.float32)
    b_return = tl.load(returns + o_t, m_t, 0.0)
    b_error = b_value - b_return
    b_loss, b_slope = b_error * b_error, 2 * b_error
    if old_values is not None:
        b_old = tl.load(old_values + o_t, m_t, 0.0).to(tl.float32)
        b_low, b_high = b_old - clip, b_old + clip
        b_inside = tl.where(b_value < b_low, b_low, tl.where(b_value > b_high, b_high, b_value))
        b_clipped = (b_inside - b_return) * (b_inside - b_return)
        b_slope = tl.where(b_loss < b_clipped, 0.0, b_slope)
        b_loss = tl.where(b_old != b_old, b_old, tl.where(b_loss < b_clipped, b_clipped, b_loss))
    tl.store(derivative + o_t, tl.where(m_t, b_weight * b_slope, 0.0), o_t < num_rows)
    tl.store(sums + i_b, tl.sum(tl.where(m_t, b_weight.to(tl.float64) * b_loss.to(tl.float64), 0.0), 0))


@triton.jit(do_not_specialize=["num_blocks"])
def value_loss_sum(sums, loss, num_blocks, BT: tl.constexpr):
    b_sum = tl.zeros([BT], tl.float64)
    for i_b in range(0, num_blocks, BT):
        o_b = i_b + tl.arange(0, BT)
        b_sum += tl.load(sums + o_b, o_b < num_blocks, 0.0)
    tl.store(loss, tl.sum(b_sum, 0).to(tl.float32))


def forward(
    values: Tensor, returns: Tensor, old_values: Tensor | None, token_weights: Tensor | None, clip: float
) -> tuple[Tensor, Tensor]:
    num_rows = values.shape[0]
    num_blocks = triton.cdiv(num_rows, ROWS["BT"])
    loss, derivative = returns.new_zeros(()), torch.empty_like(returns)
    if num_rows:
        sums = returns.new_empty(num_blocks, dtype=torch.float64)
        with torch.cuda.device_of(values):
            value_loss_rows[(num_blocks,)](
                values, returns, old_values, token_weights, derivative, sums, num_rows, 1 / num_rows, clip, **ROWS
            )
            value_loss_sum[(1,)](sums, loss, num_blocks, **SUM)
    return loss, derivative


_value_loss.register_kernel("cuda")(forward)
