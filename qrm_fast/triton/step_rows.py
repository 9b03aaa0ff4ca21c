"""Triton kernel of step_rows: values of steps spread over the rows of their steps, whitened on the way.

One program, of one warp, per block of rows. It finds the steps and the sequences of the block by search in
cache-resident boundaries, a thread finds among them those of the first of RUN rows and walks on from there, so nothing
per row is read but the penalty, and 4 bytes are written: no index tensor of length T, no launch that prepares one, and
long and short sequences cost alike. Arithmetic is in double and rounded once; a row's bits depend on its step.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ..ops.step_rows import step_rows
from .search import bit_length, bound_at, count_below, counts_below

LAUNCH = {"BT": 1024, "num_warps": 1, "maxnreg": 192}  # without the bound, ptxas spills to fit in more programs
WIDTH = tl.constexpr(32)  # boundaries that a search asks for at a time
RUN = tl.constexpr(16)  # rows that a thread takes in turn, and of which it searches the first


@triton.jit
def woven(b_rows):
    """[N RUN] from RUN tensors [N], of which the i-th has the rows i, RUN + i, ..."""
    for i in tl.static_range(4):
        b_pairs = ()
        for k in tl.static_range(8 >> i):
            b_pairs += (tl.join(b_rows[k], b_rows[k + (8 >> i)]),)
        b_rows = b_pairs
    return tl.reshape(b_rows[0], [b_rows[0].numel])


@triton.jit
def unwoven(b_x):
    """The RUN tensors that are woven to b_x."""
    b_rows = (tl.reshape(b_x, [b_x.numel // RUN, 2, 2, 2, 2]),)
    for i in tl.static_range(4):
        b_even = ()
        b_odd = ()
        for k in tl.static_range(1 << i):
            b_pair = tl.split(b_rows[k])
            b_even += (b_pair[0],)
            b_odd += (b_pair[1],)
        b_rows = b_even + b_odd
    return b_rows


@triton.jit
def walk(step_ends, cu_seqlens, begin, num_rows, num_steps, num_sequences, BT: tl.constexpr):
    """The steps and the sequences of BT rows: the first of each, and counted from there those of the first of RUN rows.

    Behind the numbers of the firsts, what next_row needs: the ends from the firsts on, and how many there are.
    """
    end = tl.minimum(begin + BT, num_rows)
    first, last = counts_below(step_ends, num_steps, begin, end, WIDTH)
    first_s, last_s = counts_below(cu_seqlens + 1, num_sequences, begin + 1, end, WIDTH)
    step_ends += first
    eos = cu_seqlens + first_s + 1
    whole_steps = tl.maximum(last - first, 0).to(tl.int32)
    whole_sequences = tl.maximum(last_s - first_s, 0).to(tl.int32)
    steps_here = tl.minimum(whole_steps + 1, num_steps - first).to(tl.int32)
    sequences_here = tl.minimum(whole_sequences + 1, num_sequences - first_s).to(tl.int32)
    # a sequence that ends is followed by the next one, unless that has no rows
    b_empty = tl.zeros([WIDTH], tl.int32)
    for i in range(1, whole_sequences + 1, WIDTH):
        o = i + tl.arange(0, WIDTH)
        m = o < sequences_here
        b_empty += tl.where(m & (tl.load(eos + o - 1, m, 0) == tl.load(eos + o, m, 0)), 1, 0)
    halvings = bit_length(whole_sequences)
    further_halvings = tl.where(tl.max(b_empty, 0) > 0, halvings, 0)
    b_first = begin + tl.arange(0, BT // RUN) * RUN
    b_k = count_below(step_ends, whole_steps, bit_length(whole_steps), b_first)
    b_s = count_below(eos, whole_sequences, halvings, b_first + 1)
    around = step_ends, eos, first > 0, steps_here, sequences_here, whole_sequences, further_halvings
    return first, first_s, b_first, b_k, b_s, around


@triton.jit
def next_row(values, base, around, b_t, b_k, b_s):
    """x of rows b_t in step b_k and sequence b_s, which of them end their steps, and where the next rows are."""
    step_ends, eos, has_before, steps_here, sequences_here, whole_sequences, further_halvings = around
    m_k, m_s = b_k < steps_here, b_s < sequences_here
    b_end, b_eos = bound_at(step_ends, b_k, m_k), tl.load(eos + b_s, m_s, -1)
    m_step, m_ends = m_k & (b_end < b_eos), b_end == b_t
    if base is not None:
        b_x = tl.load(tl.where(m_step, values + b_k, base + b_s), m_s, 0.0)
    else:
        m_tail = m_s & ~m_step & (has_before | (b_k > 0))
        b_before = tl.load(step_ends + b_k - 1, m_tail, -1).to(tl.int64)
        m_tail = m_tail & (b_before >= tl.load(eos + b_s - 1, m_tail, 0).to(tl.int64))
        b_x = tl.load(values + b_k - 1, m_tail, 0.0)
        b_x = tl.load(values + b_k, m_step, b_x - b_x)
    b_k += tl.where(m_ends, 1, 0)
    b_s += tl.where(b_eos == b_t + 1, 1, 0)
    b_s = tl.maximum(b_s, count_below(eos, whole_sequences, further_halvings, b_t + 2))
    return b_x, m_ends, b_k, b_s


@triton.jit
def whitened(b_x, mean, scale, WHITENING: tl.constexpr):
    b_y = (b_x - mean) * scale
    if WHITENING == "nonzero":
        b_y = tl.where(b_x == 0.0, 0.0, b_y)
    return b_y


@triton.jit(do_not_specialize=["num_sequences", "num_steps"])
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
    WHITENING: tl.constexpr,
    MASK_STEP_ENDS: tl.constexpr,
    BT: tl.constexpr,
):
    begin = tl.program_id(0).to(tl.int64) * BT
    first, first_s, b_first, b_k, b_s, around = walk(
        step_ends, cu_seqlens, begin, num_rows, num_steps, num_sequences, BT
    )
    values += first
    if base is not None:
        base += first_s

    mean = tl.full([], 0.0, tl.float64)
    scale = tl.full([], 1.0, tl.float64)
    if stats is not None:
        count, mean, m2 = tl.load(stats), tl.load(stats + 1), tl.load(stats + 2)
        if WHITENING == "nonzero":
            variance = tl.maximum((m2 + tl.load(stats + 3) * mean * mean) / tl.maximum(count, 1.0), 1e-8)
        else:
            variance = m2 / tl.maximum(count - 1.0, 1.0) + 1e-8
        scale = tl.rsqrt(variance)
    o_t = begin + tl.arange(0, BT)
    if penalty is not None:
        b_penalty = unwoven(tl.load(penalty + o_t, o_t < num_rows, 0.0))
    b_rows = ()
    for j in tl.static_range(RUN):
        b_x, m_ends, b_k, b_s = next_row(values, base, around, b_first + j, b_k, b_s)
        if penalty is not None:
            b_x -= b_penalty[j].to(tl.float64)
        if stats is not None:
            b_x = whitened(b_x, mean, scale, WHITENING)
        if MASK_STEP_ENDS:
            b_x = tl.where(m_ends, 0.0, b_x)
        b_rows += (b_x.to(rows.dtype.element_ty),)
    tl.store(rows + o_t, woven(b_rows), o_t < num_rows)


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
                WHITENING=whitening,
                MASK_STEP_ENDS=mask_step_ends,
                **LAUNCH,
            )
    return rows


step_rows.register_kernel("cuda")(launch)
