"""Triton kernels of pairwise_q_loss and its gradient: two launches each.

Forward reads q once, and the mask (5 bytes per row in fp32): SPLITS programs sum the rows of each sequence, a single
one turns their sums into margins and adds up the pairs, in order. Backward reads the mask and writes a gradient per
row; q is not needed. In float64, rounded once, without atomics; a margin's bits depend on its own pair only. Block
sizes have been compiled, not yet timed on a GPU.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ..ops.pairwise_q_loss import _pairwise_q_loss, _pairwise_q_loss_backward
from .search import sequence_of

ROWS = {"BT": 1024, "num_warps": 4}
PAIRS = {"BP": 256, "num_warps": 4}
SPLITS = 4  # a constant: a margin's bits must not depend on the batch


@triton.jit(do_not_specialize=["num_rows"])
def pair_sums(
    q,  # [T]
    mask,  # [T] or None
    cu_seqlens,  # [2P+1]
    sums,  # [2P, splits, 2] float64: sum and count of the rows
    num_rows,
    BT: tl.constexpr,
):
    i_s, i_p, num_splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    # Boundaries that a CPU kernel would refuse must not be read beyond the tensors.
    bos = tl.maximum(tl.load(cu_seqlens + i_s).to(tl.int64), 0)
    eos = tl.minimum(tl.load(cu_seqlens + i_s + 1).to(tl.int64), num_rows)
    b_sum = tl.zeros([BT], tl.float64)
    b_count = tl.zeros([BT], tl.float64)
    for i_t in range(bos + i_p * BT, eos, num_splits * BT):
        o_t = i_t + tl.arange(0, BT)
        m_t = o_t < eos
        if mask is not None:
            m_t = m_t & (tl.load(mask + o_t, m_t, 0) != 0)
        b_sum += tl.load(q + o_t, m_t, 0.0).to(tl.float64)
        b_count += tl.where(m_t, 1.0, 0.0)
    p_sum = sums + (i_s * num_splits + i_p) * 2
    tl.store(p_sum, tl.sum(b_sum, 0))
    tl.store(p_sum + 1, tl.sum(b_count, 0))


@triton.jit
def side(sums, o_s, m_s, SPLITS: tl.constexpr):
    """Sum and count of the rows of sequences."""
    b_sum = (o_s * 0).to(tl.float64)
    b_count = b_sum
    for i_p in tl.static_range(SPLITS):
        p_sum = sums + (o_s * SPLITS + i_p) * 2
        b_sum += tl.load(p_sum, m_s, 0.0)
        b_count += tl.load(p_sum + 1, m_s, 0.0)
    return b_sum, b_count


@triton.jit
def softplus(x):
    """log(1 + exp(x)) without overflow: max(x, 0) + log1p(u), u = exp(-|x|); log1p(u) = log(1+u) u / ((1+u) - 1)."""
    b_u = tl.exp(-tl.abs(x))
    b_more = 1.0 + b_u
    b_gained = b_more - 1.0
    return tl.where(x > 0.0, x, 0.0) + tl.where(b_gained == 0.0, b_u, tl.log(b_more) * (b_u / b_gained))


@triton.jit(do_not_specialize=["num_pairs"])
def pair_margins(
    sums,
    loss,  # []
    margin,  # [P]
    accuracy,  # []
    counts,  # [2P]
    num_pairs,
    beta: tl.float64,
    gamma: tl.float64,
    SPLITS: tl.constexpr,
    BP: tl.constexpr,
):
    b_loss = tl.zeros([BP], tl.float64)
    b_counted = tl.zeros([BP], tl.float64)
    b_right = tl.zeros([BP], tl.float64)
    for i in range(0, num_pairs, BP):
        o_p = (i + tl.arange(0, BP)).to(tl.int64)
        m_p = o_p < num_pairs
        b_chosen, b_num_chosen = side(sums, 2 * o_p, m_p, SPLITS)
        b_rejected, b_num_rejected = side(sums, 2 * o_p + 1, m_p, SPLITS)
        m_counted = m_p & (b_num_chosen > 0.0) & (b_num_rejected > 0.0)
        b_margin = tl.where(m_counted, b_chosen / b_num_chosen - b_rejected / b_num_rejected, 0.0)
        tl.store(margin + o_p, b_margin.to(tl.float32), m_p)
        tl.store(counts + 2 * o_p, b_num_chosen.to(tl.int64), m_p)
        tl.store(counts + 2 * o_p + 1, b_num_rejected.to(tl.int64), m_p)
        b_loss += tl.where(m_counted, softplus(gamma - beta * b_margin), 0.0)
        b_counted += tl.where(m_counted, 1.0, 0.0)
        b_right += tl.where(b_margin > 0.0, 1.0, 0.0)
    num_counted = tl.maximum(tl.sum(b_counted, 0), 1.0)
    tl.store(loss, (tl.sum(b_loss, 0) / num_counted).to(tl.float32))
    tl.store(accuracy, (tl.sum(b_right, 0) / num_counted).to(tl.float32))


@triton.jit(do_not_specialize=["num_pairs"])
def pair_gradients(
    grad_loss,  # []
    grad_margin,  # [P]
    margin,
    counts,
    row_grad,  # [2P] float64: of each counted row of a sequence
    num_pairs,
    beta: tl.float64,
    gamma: tl.float64,
    BP: tl.constexpr,
):
    b_counted = tl.zeros([BP], tl.float64)
    for i in range(0, num_pairs, BP):
        o_p = (i + tl.arange(0, BP)).to(tl.int64)
        b_chosen = tl.load(counts + 2 * o_p, o_p < num_pairs, 0)
        b_rejected = tl.load(counts + 2 * o_p + 1, o_p < num_pairs, 0)
        b_counted += tl.where((b_chosen > 0) & (b_rejected > 0), 1.0, 0.0)
    upstream = tl.load(grad_loss).to(tl.float64) / tl.maximum(tl.sum(b_counted, 0), 1.0)
    for i in range(0, num_pairs, BP):
        o_p = (i + tl.arange(0, BP)).to(tl.int64)
        m_p = o_p < num_pairs
        b_chosen, b_rejected = tl.load(counts + 2 * o_p, m_p, 0), tl.load(counts + 2 * o_p + 1, m_p, 0)
        # d softplus(gamma - beta margin) / d margin = -beta / (1 + exp(beta margin - gamma))
        b_slope = -beta / (1.0 + tl.exp(beta * tl.load(margin + o_p, m_p, 0.0).to(tl.float64) - gamma))
        b_grad = upstream * b_slope + tl.load(grad_margin + o_p, m_p, 0.0).to(tl.float64)
        m_counted = (b_chosen > 0) & (b_rejected > 0)
        tl.store(row_grad + 2 * o_p, tl.where(m_counted, b_grad / b_chosen, 0.0), m_p)
        tl.store(row_grad + 2 * o_p + 1, tl.where(m_counted, -b_grad / b_rejected, 0.0), m_p)


@triton.jit(do_not_specialize=["num_sequences", "num_halvings"])
def pair_rows(
    row_grad,
    mask,  # [T] or None
    cu_seqlens,  # [2P+1]
    grad,  # [T]
    num_rows,
    num_sequences,
    num_halvings,
    BT: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_t = o_t < num_rows
    b_grad = tl.load(row_grad + sequence_of(cu_seqlens, o_t, num_sequences, num_halvings), m_t, 0.0)
    if mask is not None:
        b_grad = tl.where(tl.load(mask + o_t, m_t, 0) != 0, b_grad, 0.0)
    tl.store(grad + o_t, b_grad.to(tl.float32).to(grad.dtype.element_ty), m_t)


def forward(
    q: Tensor, cu_seqlens: Tensor, mask: Tensor | None, beta: float, gamma: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_sequences = cu_seqlens.shape[0] - 1
    sums = q.new_empty(num_sequences, SPLITS, 2, dtype=torch.float64)
    loss, accuracy = q.new_empty((), dtype=torch.float32), q.new_empty((), dtype=torch.float32)
    margin = q.new_empty(num_sequences // 2, dtype=torch.float32)
    counts = q.new_empty(num_sequences, dtype=torch.int64)
    with torch.cuda.device_of(q):
        if num_sequences:
            pair_sums[(num_sequences, SPLITS)](q, mask, cu_seqlens, sums, q.shape[0], **ROWS)
        pair_margins[(1,)](sums, loss, margin, accuracy, counts, num_sequences // 2, beta, gamma, SPLITS, **PAIRS)
    return loss, margin, accuracy, counts


def backward(
    grad_loss: Tensor,
    grad_margin: Tensor,
    q: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    margin: Tensor,
    counts: Tensor,
    beta: float,
    gamma: float,
) -> Tensor:
    num_rows, num_sequences = q.shape[0], counts.shape[0]
    row_grad = counts.new_empty(num_sequences, dtype=torch.float64)
    grad = torch.empty_like(q)
    if num_rows and num_sequences:
        with torch.cuda.device_of(q):
            pair_gradients[(1,)](
                grad_loss, grad_margin, margin, counts, row_grad, num_sequences // 2, beta, gamma, **PAIRS
            )
            pair_rows[(triton.cdiv(num_rows, ROWS["BT"]),)](
                row_grad, mask, cu_seqlens, grad, num_rows, num_sequences, (num_sequences - 1).bit_length(), **ROWS
            )
    return grad


_pairwise_q_loss.register_kernel("cuda")(forward)
_pairwise_q_loss_backward.register_kernel("cuda")(backward)
