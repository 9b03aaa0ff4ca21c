"""Triton kernel of step_rows: values of steps spread over the rows of their steps, whitened on the way.

One program per block of rows. A row finds its step and its sequence by binary search in cache-resident boundaries, so
nothing per row is read but the penalty, and 4 bytes are written: no index tensor of length T, no launch that prepares
one, and long and short sequences cost alike. Arithmetic is in double and rounded once; a row's bits depend on its step.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ..ops.step_rows import step_rows
from .search import count_below

LAUNCH = {"BT": 512, "num_warps": 4}


@triton.jit(do_not_specialize=["num_sequences", "num_steps", "sequence_halvings", "step_halvings"])
def rows_of_steps(
    values,  # [K] float64
    base,  # [S] float64 or None
    step_ends,  # [K]
    cu_seqlens,  # [S+1]
    penalty,  # [T] or None
    stats,  # [2, 3] float64 or None: moments
    rows,  # [T]
    num_rows,
    num_steps,
    num_sequences,
    step_halvings,
    sequence_halvings,
    WHITENING: tl.constexpr,
    MASK_STEP_ENDS: tl.constexpr,
    BT: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_t = o_t < num_rows
    i_step = count_below(step_ends, num_steps, step_halvings, o_t)
    # the sequence with cu_seqlens[i] <= row < cu_seqlens[i + 1]
    i_seq = count_below(cu_seqlens + 1, num_sequences, sequence_halvings, o_t + 1)
    m_seq = m_t & (i_seq < num_sequences)
    b_eos = tl.load(cu_seqlens + i_seq + 1, m_seq, 0).to(tl.int64)
    b_end = tl.load(step_ends + i_step, m_t & (i_step < num_steps), num_rows).to(tl.int64)
    m_step = m_seq & (i_step < num_steps) & (b_end < b_eos)
    if base is not None:
        b_x = tl.load(base + i_seq, m_seq, 0.0)
    else:
        b_bos = tl.load(cu_seqlens + i_seq, m_seq, 0).to(tl.int64)
        b_before = tl.load(step_ends + i_step - 1, m_t & (i_step > 0), -1).to(tl.int64)
        b_x = tl.load(values + i_step - 1, m_seq & (i_step > 0) & (b_before >= b_bos), 0.0)
        b_x = b_x - b_x
    b_x = tl.where(m_step, tl.load(values + i_step, m_step, 0.0), b_x)
    if penalty is not None:
        b_x -= tl.load(penalty + o_t, m_t, 0.0).to(tl.float64)
    if stats is not None:
        count, mean, m2 = tl.load(stats), tl.load(stats + 1), tl.load(stats + 2)
        if WHITENING == "nonzero":
            variance = tl.maximum((m2 + tl.load(stats + 3) * mean * mean) / tl.maximum(count, 1.0), 1e-8)
        else:
            variance = m2 / tl.maximum(count - 1.0, 1.0) + 1e-8
        b_y = (b_x - mean) * tl.rsqrt(variance)
        b_x = tl.where((b_x == 0.0) & (WHITENING == "nonzero"), 0.0, b_y)
    if MASK_STEP_ENDS:
        b_x = tl.where((i_step < num_steps) & (b_end == o_t), 0.0, b_x)
    tl.store(rows + o_t, b_x.to(rows.dtype.element_ty), m_t)


def launch(
    values: Tensor,
    base: Tensor | None,
    step_ends: Tensor,
    cu_seqlens: Tensor,
    penalty: Tensor | None,
    stats: Tensor | None,
    whitening: str,
    num_tokens: int,
    mask_step_ends: bool,
    wide: bool,
) -> Tensor:
    num_steps, num_sequences = step_ends.shape[0], cu_seqlens.shape[0] - 1
    rows = values.new_empty(num_tokens, dtype=torch.float64 if wide else torch.float32)
    if num_tokens:
        with torch.cuda.device_of(values):
            rows_of_steps[(triton.cdiv(num_tokens, LAUNCH["BT"]),)](
                values,
                base,
                step_ends,
                cu_seqlens,
                penalty,
                stats,
                rows,
                num_tokens,
                num_steps,
                num_sequences,
                num_steps.bit_length(),
                num_sequences.bit_length(),
                WHITENING=whitening,
                MASK_STEP_ENDS=mask_step_ends,
                **LAUNCH,
            )
    return rows


step_rows.register_kernel("cuda")(launch)
