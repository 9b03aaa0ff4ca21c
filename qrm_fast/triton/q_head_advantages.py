"""Triton kernel of q_head_advantages: hidden states to advantages, one launch behind a memset of 4 bytes per sequence.

Fused: the Q-head's product, the sequence's mean and spread, normalisation and EOS re-score. Each hidden row is read
once, 2 D bytes in bf16 for 2 D FLOP; logits, masks as numbers and moments are never written. A program takes ROWS rows
of one sequence, counted from its first, so that a long answer among short ones is spread over the GPU; it finds them by
binary search in cu_seqlens. Q is written to the result, and the program that is the last of its sequence to have done
so, as a counter of integers tells, reads it back three times from L2 (16 bytes per row beside 2 D): for the mean, the
spread about it, and to be normalised. That work is the same whichever program does it, in blocks of BR rows from the
first: a row's bits depend on its own sequence, never on timing. Sums over a sequence are in double: q is far from zero
when a Q-RM is, and a double costs nothing beside 2 D bytes.
Block sizes give each thread 16-byte loads in bf16. They have been compiled, not yet timed on a GPU.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ..ops.q_head_advantages import _q_head_advantages
from .search import boundary, sequence_at

LAUNCH = {"ROWS": 64, "BT": 16, "BD": 512, "BR": 512, "num_warps": 8}


@triton.jit
def counted_rows(mask, advantages, o_t, m_t):
    """q of a block of rows, and which of them count: unmasked and finite."""
    b_q = tl.load(advantages + o_t, m_t, 0.0, cache_modifier=".cg").to(tl.float64)  # other programs wrote it
    m_counted = m_t & (b_q - b_q == 0.0)
    m_kept = m_t
    if mask is not None:
        m_kept = m_t & (tl.load(mask + o_t, m_t, 0) != 0)
    return b_q, m_counted & m_kept, m_kept


@triton.jit(do_not_specialize=["num_rows", "num_sequences", "num_halvings"])
def q_head_advantages(
    hidden,  # [T, D]
    head,  # [D]
    cu_seqlens,  # [S+1]
    mask,  # [T] or None
    advantages,  # [T]
    arrived,  # [S], zeros: programs of each sequence that have written their q
    stride_hidden,
    num_rows,
    num_sequences,
    num_halvings,
    dim,
    min_std,
    eps,
    CENTER: tl.constexpr,
    RESCORE: tl.constexpr,
    ROWS: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
):
    i_slot = tl.program_id(0).to(tl.int64)
    i_s = sequence_at(cu_seqlens, i_slot, num_sequences, num_halvings, num_rows, ROWS)
    m_s = i_s < num_sequences
    bos, eos = boundary(cu_seqlens, i_s, m_s, num_rows), boundary(cu_seqlens, i_s + 1, m_s, num_rows)
    i_run, num_runs = i_slot - (i_s + bos // ROWS), tl.cdiv(eos - bos, ROWS)
    if (i_run < 0) | (i_run >= num_runs):
        return

    # q_t = h_t . head
    begin = bos + i_run * ROWS
    end = tl.minimum(begin + ROWS, eos)
    for i_t in range(begin, end, BT):
        o_t = i_t + tl.arange(0, BT).to(tl.int64)
        m_t = o_t < end
        m_read = m_t
        if mask is not None:
            m_read = m_t & (tl.load(mask + o_t, m_t, 0) != 0)
        b_product = tl.zeros([BT, BD], tl.float32)
        for i_d in range(0, dim, BD):
            o_d = i_d + tl.arange(0, BD)
            m = m_read[:, None] & (o_d < dim)[None, :]
            b_h = tl.load(hidden + o_t[:, None] * stride_hidden + o_d[None, :], m, 0.0).to(tl.float32)  # [BT, BD]
            b_w = tl.load(head + o_d, o_d < dim, 0.0).to(tl.float32)  # [BD]
            b_product += b_h * b_w[None, :]
        tl.store(advantages + o_t, tl.sum(b_product, 1), m_t)
    tl.debug_barrier()
    if num_runs > 1:
        before = tl.atomic_add(arrived + i_s, 1, sem="acq_rel")
        tl.debug_barrier()
        if before + 1 < num_runs:
            return

    # mean and m2 of the counted rows; sums of float32 values are exact in double where they are all equal
    b_count = tl.zeros([BR], tl.float64)
    b_sum = tl.zeros([BR], tl.float64)
    for i_t in range(bos, eos, BR):
        o_t = i_t + tl.arange(0, BR)
        b_q, m_counted, _ = counted_rows(mask, advantages, o_t, o_t < eos)
        b_count += tl.where(m_counted, 1.0, 0.0)
        b_sum += tl.where(m_counted, b_q, 0.0)
    count = tl.sum(b_count, 0)
    mean = tl.sum(b_sum, 0) / tl.maximum(count, 1.0)
    b_m2 = tl.zeros([BR], tl.float64)
    for i_t in range(bos, eos, BR):
        o_t = i_t + tl.arange(0, BR)
        b_q, m_counted, _ = counted_rows(mask, advantages, o_t, o_t < eos)
        b_deviation = tl.where(m_counted, b_q - mean, 0.0)
        b_m2 += b_deviation * b_deviation
    sigma = tl.sqrt(tl.sum(b_m2, 0) / tl.maximum(count, 1.0))
    sigma = tl.maximum(sigma, min_std)
    scale = tl.where(sigma > 0.0, 1.0 / (sigma + eps), 0.0)
    shift = mean * 0.0
    if CENTER:
        shift = mean

    # A_t = (q_t - mu) / (sigma + eps); the last kept row takes the mean of all of them
    b_total = tl.zeros([BR], tl.float64)
    b_kept = tl.zeros([BR], tl.float64)
    b_last = tl.full([BR], -1, tl.int64)
    tl.debug_barrier()
    for i_t in range(bos, eos, BR):
        o_t = i_t + tl.arange(0, BR)
        m_t = o_t < eos
        b_q, _, m_kept = counted_rows(mask, advantages, o_t, m_t)
        b_y = tl.where(m_kept, (b_q - shift) * scale, 0.0)
        b_total += b_y
        b_kept += tl.where(m_kept, 1.0, 0.0)
        b_last = tl.where(m_kept, o_t, b_last)
        tl.debug_barrier()  # where BR rows are fewer than threads, several read a row that one of them then overwrites
        tl.store(advantages + o_t, b_y.to(tl.float32), m_t)
    if RESCORE:
        tl.debug_barrier()
        i_last = tl.max(b_last, 0)
        average = tl.sum(b_total, 0) / tl.maximum(tl.sum(b_kept, 0), 1.0)
        tl.store(advantages + i_last, average.to(tl.float32), i_last >= 0)


def launch(
    hidden: Tensor,
    head: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    center: bool,
    rescore_last: bool,
    min_std: float,
    eps: float,
) -> Tensor:
    (num_rows, dim), num_sequences = hidden.shape, cu_seqlens.shape[0] - 1
    advantages = hidden.new_empty(num_rows, dtype=torch.float32)
    if num_rows and num_sequences:
        arrived = torch.zeros(num_sequences, dtype=torch.int32, device=hidden.device)
        with torch.cuda.device_of(hidden):
            q_head_advantages[(num_rows // LAUNCH["ROWS"] + num_sequences,)](
                hidden,
                head,
                cu_seqlens,
                mask,
                advantages,
                arrived,
                hidden.stride(0),
                num_rows,
                num_sequences,
                num_sequences.bit_length(),
                dim,
                min_std,
                eps,
                CENTER=center,
                RESCORE=rescore_last,
                **LAUNCH,
            )
    return advantages


_q_head_advantages.register_kernel("cuda")(launch)
