"""Triton kernels of loss_weights: one launch that writes the rows, 4 bytes each and 1 with a mask.

Where rows or sequences are to be counted, a launch over the sequences and one that adds them up come before; boundaries
and masks are then read twice. In float64, rounded once, without atomics; compiled, not yet timed on a GPU.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ..ops.loss_weights import _loss_weights
from .search import sequence_of

ROWS = {"BT": 1024, "num_warps": 4}
SEQUENCES = {"BS": 1024, "num_warps": 4}


@triton.jit
def count_rows(
    cu_seqlens,  # [S+1]
    mask,  # [T] or None
    counts,  # [S] float64
    num_rows,
    BT: tl.constexpr,
):
    i_s = tl.program_id(0).to(tl.int64)
    # Boundaries that a CPU kernel would refuse must not be read beyond the tensors.
    bos = tl.maximum(tl.load(cu_seqlens + i_s).to(tl.int64), 0)
    eos = tl.minimum(tl.load(cu_seqlens + i_s + 1).to(tl.int64), num_rows)
    if mask is not None:
        b_count = tl.zeros([BT], tl.int64)
        for i_t in range(bos, eos, BT):
            o_t = i_t + tl.arange(0, BT)
            b_count += tl.where(tl.load(mask + o_t, o_t < eos, 0) != 0, 1, 0)
        tl.store(counts + i_s, tl.sum(b_count, 0).to(tl.float64))
    else:
        tl.store(counts + i_s, tl.maximum(eos - bos, 0).to(tl.float64))


@triton.jit
def add_counts(
    counts,  # [S] float64
    total,  # [1] float64
    num_sequences,
    TOKENS: tl.constexpr,  # of the rows; else of the sequences that have some
    BS: tl.constexpr,
):
    b_total = tl.zeros([BS], tl.float64)
    for i in range(0, num_sequences, BS):
        o_s = i + tl.arange(0, BS)
        b_count = tl.load(counts + o_s, o_s < num_sequences, 0.0)
        b_total += b_count if TOKENS else tl.where(b_count > 0.0, 1.0, 0.0)
    tl.store(total, tl.sum(b_total, 0))


@triton.jit
def weigh_rows(
    cu_seqlens,
    mask,
    counts,  # [S] float64, or None: all sequences weigh alike
    total,  # [1] float64, or None: it is in `denominator`
    weights,  # [T]
    num_rows,
    num_sequences,
    num_halvings,
    denominator: tl.float64,
    BT: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_t = o_t < num_rows
    b_denominator = tl.zeros([BT], tl.float64) + denominator
    if total is not None:
        b_denominator *= tl.load(total)
    if counts is not None:
        b_denominator *= tl.load(counts + sequence_of(cu_seqlens, o_t, num_sequences, num_halvings), m_t, 1.0)
    b_weight = 1.0 / b_denominator
    if mask is not None:
        b_weight = tl.where(tl.load(mask + o_t, m_t, 0) != 0, b_weight, 0.0)
    tl.store(weights + o_t, b_weight.to(tl.float32), m_t)


def launch(cu_seqlens: Tensor, mask: Tensor | None, num_tokens: int, mode: str, total: float, norm: float) -> Tensor:
    num_sequences = cu_seqlens.shape[0] - 1
    weights = cu_seqlens.new_empty(num_tokens, dtype=torch.float32)
    if num_tokens == 0 or num_sequences == 0:
        return weights
    of_tokens, per_sequence = mode == "token-mean", mode == "seq-mean-token-mean"
    if of_tokens and mask is None:
        total = total or num_tokens
    counts = here = None
    with torch.cuda.device_of(cu_seqlens):
        if per_sequence or not total:
            counts = cu_seqlens.new_empty(num_sequences, dtype=torch.float64)
            count_rows[(num_sequences,)](cu_seqlens, mask, counts, num_tokens, **ROWS)
        if not total:
            here = cu_seqlens.new_empty(1, dtype=torch.float64)
            add_counts[(1,)](counts, here, num_sequences, TOKENS=of_tokens, **SEQUENCES)
        weigh_rows[(triton.cdiv(num_tokens, ROWS["BT"]),)](
            cu_seqlens,
            mask,
            counts if per_sequence else None,
            here,
            weights,
            num_tokens,
            num_sequences,
            (num_sequences - 1).bit_length(),
            (total or 1.0) * norm,
            **ROWS,
        )
    return weights


_loss_weights.register_kernel("cuda")(launch)
