"""Triton kernels of gather_logprobs: log-probability and entropy of each token from logits.

Forward reads every logit once, 2 T V bytes in bf16, and writes 16 bytes per row; a program folds one row online. The
running (max, sum, weighted sum) is kept per lane, a column modulo LANES that one thread always holds: a block costs one
exponential per logit, one per lane and DEPTH logits to rescale, and no exchange between threads until the row ends.
Lanes are then combined in one fixed tree. Eleven instructions per logit keep up with the memory of an H200, which
delivers one logit in thirteen. Backward reads the logits once more and writes their gradient, 4 T V bytes. Rows that
are ignored, or without upstream gradient, are not read. Block sizes have been compiled, not yet timed on a GPU.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ..ops.gather_logprobs import _gather_logprobs, _gather_logprobs_backward
from .logits import per_row, rescale, tanh

FOLD = {"LANES": 1024, "DEPTH": 8, "num_warps": 4}
GRADIENT = {"BV": 4096, "num_warps": 8}


@triton.jit
def finished(b_z, softcap, b_temperature):
    """softcap(z) / temperature; None leaves a step out."""
    b_z = b_z.to(tl.float32)
    if softcap is not None:
        b_z = softcap * tanh(b_z / softcap)
    if b_temperature is not None:
        b_z /= b_temperature
    return b_z


@triton.jit
def rescaled(b_max, b_sum, b_weighted, b_top):
    """sum e^(z - max) and sum (z - max) e^(z - max) about another maximum; a sum of 0 is no column."""
    b_scale, b_shift = rescale(b_max, b_sum, b_top)
    return b_scale * b_sum, b_scale * (b_weighted + b_shift * b_sum)


@triton.jit
def folded(b_z, b_max, b_sum, b_weighted):
    """The statistics of each lane with a block of logits [DEPTH, LANES] added."""
    b_top = tl.maximum(b_max, tl.max(b_z, 0))
    b_sum, b_weighted = rescaled(b_max, b_sum, b_weighted, b_top)
    b_shift = b_z - tl.where(b_top == float("-inf"), 0.0, b_top)[None, :]
    b_e = tl.exp2(1.4426950408889634 * b_shift)
    b_shift = tl.maximum(b_shift, -1000.0)  # where e is 0 the shift may be -inf
    return b_top, b_sum + tl.sum(b_e, 0), b_weighted + tl.sum(b_e * b_shift, 0)


@triton.jit
def gather_logprobs_fold(
    logits,  # [T, V]
    targets,  # [T]
    temperatures,  # [T] or None
    logprobs,  # [T]
    entropy,  # [T]
    lse,  # [T]
    lse_residual,  # [T]
    stride_logits,
    vocab,
    softcap,  # or None
    ignore_index,
    LANES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    i_target = tl.load(targets + i_t)
    m_ignored = i_target == ignore_index
    m_inside = (i_target >= 0) & (i_target < vocab)
    p_row = logits + i_t * stride_logits
    b_temperature = None
    if temperatures is not None:
        b_temperature = tl.load(temperatures + i_t)
    b_max = tl.full([LANES], float("-inf"), tl.float32)
    b_sum = tl.zeros([LANES], tl.float32)
    b_weighted = tl.zeros([LANES], tl.float32)
    o_v = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]  # [DEPTH, LANES]
    num_columns = tl.where(m_ignored, 0, vocab)
    num_whole = num_columns // (LANES * DEPTH) * (LANES * DEPTH)
    for i_v in range(0, num_whole, LANES * DEPTH):
        b_z = finished(tl.load(p_row + i_v + o_v), softcap, b_temperature)
        b_max, b_sum, b_weighted = folded(b_z, b_max, b_sum, b_weighted)
    if num_whole < num_columns:
        m_v = o_v < num_columns - num_whole
        b_z = finished(tl.load(p_row + num_whole + o_v, m_v, 0.0), softcap, b_temperature)
        b_max, b_sum, b_weighted = folded(tl.where(m_v, b_z, float("-inf")), b_max, b_sum, b_weighted)

    b_top = tl.max(b_max, 0)
    b_sum, b_weighted = rescaled(b_max, b_sum, b_weighted, b_top)
    b_total = tl.sum(b_sum, 0)
    b_log_sum = tl.log(b_total)
    b_target = finished(tl.load(p_row + i_target, m_inside & ~m_ignored, 0.0), softcap, b_temperature)
    b_logprob = (b_target - b_top) - b_log_sum
    b_entropy = b_log_sum - tl.sum(b_weighted, 0) / b_total
    b_lse = b_top + b_log_sum
    b_residual = (b_top - b_lse) + b_log_sum
    b_outside = tl.where(m_inside, 0.0, float("nan"))
    tl.store(logprobs + i_t, tl.where(m_ignored, 0.0, tl.where(b_logprob > 0, 0.0, b_logprob) + b_outside))
    tl.store(entropy + i_t, tl.where(m_ignored, 0.0, tl.where(b_entropy < 0, 0.0, b_entropy) + b_outside))
    tl.store(lse + i_t, tl.where(m_ignored, 0.0, b_lse + b_outside))
    tl.store(lse_residual + i_t, tl.where(m_ignored, 0.0, b_residual + b_outside))


@triton.jit
def gather_logprobs_gradient(
    grad_logprobs,  # [T]
    grad_entropy,  # [T]
    logits,  # [T, V]
    targets,  # [T]
    temperatures,  # [T] or None
    entropy,  # [T]
    lse,  # [T]
    lse_residual,  # [T]
    grad_logits,  # [T, V]
    stride_logits,
    vocab,
    softcap,
    ignore_index,
    BV: tl.constexpr,
):
    num_blocks = tl.cdiv(vocab, BV)
    i_t, i_v = (tl.program_id(0) // num_blocks).to(tl.int64), tl.program_id(0) % num_blocks * BV
    o_v = i_v + tl.arange(0, BV)
    i_target = tl.load(targets + i_t)
    b_g, b_e = tl.load(grad_logprobs + i_t), tl.load(grad_entropy + i_t)
    m_idle = (i_target == ignore_index) | ((b_g == 0) & (b_e == 0))
    num_columns = tl.where(m_idle, 0, vocab)
    b_temperature = None
    if temperatures is not None:
        b_temperature = tl.load(temperatures + i_t)
    b_z = finished(tl.load(logits + i_t * stride_logits + o_v, o_v < num_columns, 0.0), softcap, b_temperature)
    # dz_v = g (1[v = target] - p_v) - e p_v (log p_v + H), through temperature and softcap
    b_logp = (b_z - tl.load(lse + i_t)) - tl.load(lse_residual + i_t)
    b_p = tl.exp(b_logp)
    b_dz = -b_p * (b_g + b_e * (b_logp + tl.load(entropy + i_t)))
    b_dz = tl.where(b_p == 0, 0.0, b_dz) + tl.where(o_v == i_target, b_g, 0.0)
    if softcap is not None:
        b_y = b_z / softcap
        if b_temperature is not None:
            b_y *= b_temperature
        b_dz *= 1 - b_y * b_y
    if b_temperature is not None:
        b_dz /= b_temperature
    tl.store(grad_logits + i_t * vocab + o_v, tl.where(m_idle, 0.0, b_dz), o_v < vocab)


def forward(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows, vocab = logits.shape
    logprobs, entropy, lse, residual = (logits.new_empty(num_rows, dtype=torch.float32) for _ in range(4))
    if num_rows:
        with torch.cuda.device_of(logits):
            gather_logprobs_fold[(num_rows,)](
                logits,
                targets,
                per_row(temperature, temperatures, targets),
                logprobs,
                entropy,
                lse,
                residual,
                logits.stride(0),
                vocab,
                softcap,
                ignore_index,
                **FOLD,
            )
    return logprobs, entropy, lse, residual


def backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    entropy: Tensor,
    lse: Tensor,
    lse_residual: Tensor,
) -> Tensor:
    num_rows, vocab = logits.shape
    grad_logits = logits.new_empty(logits.shape)
    if num_rows:
        with torch.cuda.device_of(logits):
            gather_logprobs_gradient[(num_rows * triton.cdiv(vocab, GRADIENT["BV"]),)](
                grad_logprobs,
                grad_entropy,
                logits,
                targets,
                per_row(temperature, temperatures, targets),
                entropy,
                lse,
                lse_residual,
                grad_logits,
                logits.stride(0),
                vocab,
                softcap,
                ignore_index,
                **GRADIENT,
            )
    return grad_logits


_gather_logprobs.register_kernel("cuda")(forward)
_gather_logprobs_backward.register_kernel("cuda")(backward)
