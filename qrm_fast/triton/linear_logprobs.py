"""Triton kernels of linear_logprobs: log-probability and entropy of hidden states under a vocabulary head.

A program multiplies BT hidden rows with one split of the vocabulary, BV columns at a time, in float32 accumulators;
bias, softcap, temperature and the online fold into (max, sum, weighted sum) happen in registers, so a logit is never
rounded to 16 bits and never written. V is cut into splits from V alone, their statistics are merged in order by a
second launch, 12 bytes per row and 2048 columns; a row's bits depend on that row, weight and bias. 2 T D V FLOP.
Programs run through GROUP blocks of rows for one split before the next split: a wave of programs then reads as many
weight tiles as hidden tiles, about 15 MB each for D = 3584, and both stay in L2, where one block of rows per wave would
read all of weight T / BT times. On Hopper csrc/cuda/head_fold.cu, where it is compiled, folds 16-bit inputs instead.
The gradients are in linear_logprobs_backward.
Block sizes have been compiled, not yet timed on a GPU.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ..ops.linear_logprobs import _forward
from .logits import MERGE, SPLIT, Head, load_temperature, logits, per_row, picked, target_column
from .product import GROUP, blocks, capability, compiled, describable, grouped, operand, store_block, vectorised


@triton.jit
def merged(b_max, b_sum, b_weighted, b_max2, b_sum2, b_weighted2):
    """Statistics max z, sum e^(z - max), sum (z - max) e^(z - max) of two sets of columns; a sum of 0 is no column."""
    b_top = tl.maximum(b_max, b_max2)
    b_shift = tl.where(b_sum == 0, 0.0, b_max - b_top)
    b_shift2 = tl.where(b_sum2 == 0, 0.0, b_max2 - b_top)
    b_scale, b_scale2 = tl.exp(b_shift), tl.exp(b_shift2)
    b_weighted = b_scale * (b_weighted + b_shift * b_sum) + b_scale2 * (b_weighted2 + b_shift2 * b_sum2)
    return b_top, b_scale * b_sum + b_scale2 * b_sum2, b_weighted


@triton.jit(do_not_specialize=["stride_statistics", "num_rows"])
def linear_logprobs_fold(
    hidden,  # [T, D]
    weight,  # [V, D]
    targets,  # [T]
    bias,  # [V] or None
    temperatures,  # [T] or None
    softcap,  # or None
    statistics,  # [3, splits, T]: maximum, sum and weighted sum of each split
    target_logits,  # [T]
    kept,  # [T, V] or None: e^(z - top), or z where tops is None
    tops,  # [blocks of columns, T] or None: the top of each block of BV columns
    running,  # [2, blocks of columns, T] or None: maximum and sum of the split after each block of BV columns
    stride_hidden,
    stride_weight,
    stride_statistics,
    stride_kept,
    stride_running,
    num_rows,
    vocab,
    dim,
    DESCRIBED: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
):
    i_t, i_s = grouped(tl.program_id(0), tl.cdiv(num_rows, BT), tl.cdiv(vocab, SPLIT), GROUP)
    i_t *= BT
    o_t = i_t + tl.arange(0, BT)
    m_t = o_t < num_rows
    b_target = tl.load(targets + o_t, m_t, -1)
    b_temperature = load_temperature(temperatures, o_t, m_t)
    rows, columns = (hidden, stride_hidden, num_rows, dim), (weight, stride_weight, vocab, dim)

    b_max = tl.full([BT], float("-inf"), tl.float32)
    b_sum = tl.zeros([BT], tl.float32)
    b_weighted = tl.zeros([BT], tl.float32)
    b_target_logit = tl.zeros([BT], tl.float32)
    for i_v in range(i_s * SPLIT, tl.minimum(i_s * SPLIT + SPLIT, vocab), BV):
        b_z = logits(rows, columns, bias, softcap, b_temperature, i_t, i_v, DESCRIBED, BT, BV, BD)
        b_target_logit += picked(b_z, target_column(b_target, i_v, BV), BV)
        b_top = tl.max(b_z, 1)
        b_origin = tl.where(b_top == float("-inf"), 0.0, b_top)
        b_shift = b_z - b_origin[:, None]
        b_e = tl.exp2(1.4426950408889634 * b_shift)
        if tops is not None:
            tl.store(tops + i_v // BV * num_rows + o_t, b_origin, m_t)
        # where e is 0 the shift may be -inf
        b_max, b_sum, b_weighted = merged(
            b_max, b_sum, b_weighted, b_top, tl.sum(b_e, 1), tl.sum(b_e * tl.maximum(b_shift, -1000.0), 1)
        )
        if running is not None:
            p = running + i_v // BV * num_rows + o_t
            tl.store(p, b_max, m_t)
            tl.store(p + stride_running, b_sum, m_t)
        if kept is not None:
            b_kept = b_z if tops is None else b_e
            store_block((kept, stride_kept, num_rows, vocab), i_t, i_v, b_kept, DESCRIBED, BT, BV)
    p = statistics + i_s.to(tl.int64) * num_rows + o_t
    tl.store(p, b_max, m_t)
    p += stride_statistics
    tl.store(p, b_sum, m_t)
    p += stride_statistics
    tl.store(p, b_weighted, m_t)
    m_split = (b_target >= i_s * SPLIT) & (b_target < i_s * SPLIT + SPLIT)
    tl.store(target_logits + o_t, b_target_logit, m_t & m_split)


@triton.jit
def merged_splits(statistics, stride_statistics, num_rows, num_splits, o_t, m_t):
    """Statistics of all splits, merged in their order."""
    b_max = tl.full(o_t.shape, float("-inf"), tl.float32)
    b_sum = tl.zeros(o_t.shape, tl.float32)
    b_weighted = tl.zeros(o_t.shape, tl.float32)
    p_max = statistics + o_t
    p_sum = p_max + stride_statistics
    p_weighted = p_sum + stride_statistics
    for _ in range(0, num_splits):
        b_max2, b_sum2 = tl.load(p_max, m_t, 0.0), tl.load(p_sum, m_t, 0.0)
        b_max, b_sum, b_weighted = merged(b_max, b_sum, b_weighted, b_max2, b_sum2, tl.load(p_weighted, m_t, 0.0))
        p_max += num_rows
        p_sum += num_rows
        p_weighted += num_rows
    return b_max, b_sum, b_weighted


@triton.jit
def finished_rows(
    statistics, target_logits, b_target, m_idle, stride_statistics, num_rows, vocab, num_splits, o_t, m_t
):
    """logprobs, entropy, lse and what rounding took from it: 0 in idle rows, NaN where the target is no column."""
    b_max, b_sum, b_weighted = merged_splits(statistics, stride_statistics, num_rows, num_splits, o_t, m_t)
    m_inside = (b_target >= 0) & (b_target < vocab)
    b_log_sum = tl.log(b_sum)
    b_lse = b_max + b_log_sum
    b_logprob = (tl.load(target_logits + o_t, m_t & m_inside, 0.0) - b_max) - b_log_sum
    b_entropy = b_log_sum - b_weighted / b_sum
    b_outside = tl.where(m_inside, 0.0, float("nan"))
    return (
        tl.where(m_idle, 0.0, tl.where(b_logprob > 0, 0.0, b_logprob) + b_outside),
        tl.where(m_idle, 0.0, tl.where(b_entropy < 0, 0.0, b_entropy) + b_outside),
        tl.where(m_idle, 0.0, b_lse + b_outside),
        tl.where(m_idle, 0.0, (b_max - b_lse) + b_log_sum + b_outside),
    )


@triton.jit(do_not_specialize=["stride_statistics", "num_rows"])
def linear_logprobs_merge(
    statistics,  # [3, splits, T]
    target_logits,  # [T]
    targets,  # [T]
    logprobs,  # [T]
    entropy,  # [T]
    lse,  # [T]
    lse_residual,  # [T]
    stride_statistics,
    num_rows,
    vocab,
    num_splits,
    ignore_index,
    BT: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_t = o_t < num_rows
    b_target = tl.load(targets + o_t, m_t, 0)
    m_idle = b_target == ignore_index
    results = finished_rows(
        statistics, target_logits, b_target, m_idle, stride_statistics, num_rows, vocab, num_splits, o_t, m_t
    )
    outputs = (logprobs, entropy, lse, lse_residual)
    for i in tl.static_range(4):
        tl.store(outputs[i] + o_t, results[i], m_t)


def fold(
    head: Head,
    target_logits: Tensor,
    kept: Tensor | None = None,
    tops: Tensor | None = None,
    running: Tensor | None = None,
) -> Tensor:
    """Statistics [3, splits, T] of every split; writes the logits of those targets that are columns.

    `kept` [T, V] receives the logits, or their exponentials where `tops` receives what they are relative to; `running`
    maximum and sum of a split after each of its blocks of columns.
    """
    hidden, weight, targets, bias, temperatures, softcap = head
    (num_rows, dim), vocab = hidden.shape, len(weight)
    num_splits = triton.cdiv(vocab, SPLIT)
    statistics = hidden.new_empty(3, num_splits, num_rows, dtype=torch.float32)
    if compiled(hidden, weight):
        torch.ops.qrm_fast.head_fold(*head, statistics, target_logits, kept, tops, running)
        return statistics
    described = describable(hidden, weight)
    launch = fold_blocks(head, kept is not None)
    linear_logprobs_fold[(triton.cdiv(num_rows, launch["BT"]) * num_splits,)](
        operand(hidden, described, launch["BT"], launch["BD"]),
        operand(weight, described, launch["BV"], launch["BD"]),
        targets,
        bias,
        temperatures,
        softcap,
        statistics,
        target_logits,
        None if kept is None else operand(kept, described, launch["BT"], launch["BV"]),
        tops,
        running,
        hidden.stride(0),
        weight.stride(0),
        statistics.stride(0),
        0 if kept is None else kept.stride(0),
        0 if running is None else running.stride(0),
        num_rows,
        vocab,
        dim,
        described,
        SPLIT,
        GROUP,
        **launch,
    )
    return statistics


def fold_blocks(head: Head, kept: bool) -> dict[str, int]:
    """What is kept changes no block's columns nor depth: a log-probability has the same bits either way.

    Half the columns where a softcap, or pointers with a bias or to rows that are no vectors, take the registers of the
    kernel above.
    """
    hidden, weight, _, bias, _, softcap = head
    described = describable(hidden, weight)
    crowded = softcap is not None or (not described and (bias is not None or not vectorised(hidden, weight)))
    crowded &= not compiled(hidden, weight)
    launch = blocks(hidden.dtype, capability(hidden), described, halved=crowded, stored=kept and described)
    return launch if described else launch | {"BD": min(launch["BD"], 32)}


def merge(statistics: Tensor, target_logits: Tensor, head: Head, ignore_index: int) -> tuple[Tensor, ...]:
    """logprobs, entropy, lse, lse_residual, [T] each."""
    _, num_splits, num_rows = statistics.shape
    results = tuple(torch.empty_like(target_logits) for _ in range(4))
    linear_logprobs_merge[(triton.cdiv(num_rows, MERGE["BT"]),)](
        statistics,
        target_logits,
        head.targets,
        *results,
        statistics.stride(0),
        num_rows,
        len(head.weight),
        num_splits,
        ignore_index,
        **MERGE,
    )
    return results


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, ...]:
    target_logits = hidden.new_empty(len(targets), dtype=torch.float32)
    if len(targets) == 0:
        return tuple(torch.empty_like(target_logits) for _ in range(4))
    with torch.cuda.device_of(hidden):
        head = Head(hidden, weight, targets, bias, per_row(temperature, temperatures, targets), softcap)
        return merge(fold(head, target_logits), target_logits, head, ignore_index)


_forward.register_kernel("cuda")(forward)
