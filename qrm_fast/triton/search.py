"""Binary searches in ascending boundaries: which sequence or step has a row, which steps and rows a sequence has.

Boundaries lie in L2, so that a search costs less than reading an index per row, which nothing then has to write.
Whatever the boundaries hold, a search stays inside them.
"""

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]


@triton.jit
def sequence_of(cu_seqlens, o_t, num_sequences, num_halvings):
    """The first sequence that ends after each row: a binary search that stays in [0, S) whatever the boundaries."""
    o_low = tl.zeros_like(o_t)
    o_high = o_low + (num_sequences - 1)
    for _ in range(num_halvings):
        o_middle = (o_low + o_high) // 2
        m_later = tl.load(cu_seqlens + o_middle + 1) <= o_t
        o_low = tl.where(m_later, tl.minimum(o_middle + 1, num_sequences - 1), o_low)
        o_high = tl.where(m_later, o_high, o_middle)
    return o_low


@triton.jit
def bit_length(n):
    """Of n >= 0, or 1 more above 2^24: a search among n boundaries takes as many halvings."""
    return (n.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126


@triton.jit
def bound_at(bounds, o, m):
    """The bounds at `o`, beyond every row where there is none."""
    return tl.load(bounds + o, m, 2**31 - 1 if bounds.dtype.element_ty == tl.int32 else 2**63 - 1)


@triton.jit
def count_below(bounds, num_bounds, num_halvings, b_row):
    """How many of the ascending `bounds` are below each row, int32; num_bounds < 2^num_halvings."""
    b_low = tl.zeros(b_row.shape, tl.int32)
    last = bounds - 1  # of n bounds, at n
    for i in range(0, num_halvings):
        b_next = b_low + (1 << (num_halvings - 1 - i))
        b_bound = bound_at(last, b_next, b_next <= num_bounds)
        b_low = tl.where(b_bound < b_row, b_next, b_low)
    return b_low


@triton.jit
def counts_below(bounds, num_bounds, row, later, W: tl.constexpr):
    """How many of the ascending `bounds` are below either row, found by a program: a step asks W of them for each."""
    o = tl.arange(0, W)
    first = row * 0
    last = first
    num_counts = first + num_bounds + 1  # that may be meant, from `first` and `last` on
    while num_counts > 1:
        stride = tl.cdiv(num_counts, W)
        b_first, b_last = first + o * stride, last + o * stride
        m_first, m_last = (o > 0) & (b_first <= num_bounds), (o > 0) & (b_last <= num_bounds)
        m_first = m_first & (tl.load(bounds + b_first - 1, m_first, 0).to(tl.int64) < row)
        m_last = m_last & (tl.load(bounds + b_last - 1, m_last, 0).to(tl.int64) < later)
        passed = tl.sum(m_first.to(tl.int32) + (m_last.to(tl.int32) << 16), 0)
        first += (passed & 0xFFFF) * stride
        last += (passed >> 16) * stride
        num_counts = stride
    return first, last


@triton.jit
def first_from(ids, num_ids, group):
    """The place of the first of ascending ids that is not below `group`."""
    low = group * 0
    high = low + num_ids
    while low < high:
        middle = (low + high) // 2
        below = tl.load(ids + middle).to(tl.int64) < group
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def steps_of(step_ends, num_steps, begin, end):
    """The steps [first, last) that end in rows [begin, end)."""
    first, last = counts_below(step_ends, num_steps, begin, end, 64)
    return first, tl.maximum(first, last)


@triton.jit
def rows_of(cu_seqlens, i_s, num_tokens):
    """The rows [bos, eos) of a sequence, inside [0, T] whatever the boundaries."""
    bos = tl.minimum(tl.maximum(tl.load(cu_seqlens + i_s).to(tl.int64), 0), num_tokens)
    return bos, tl.minimum(tl.maximum(tl.load(cu_seqlens + i_s + 1).to(tl.int64), bos), num_tokens)


@triton.jit
def sequence_bounds(step_ends, cu_seqlens, i_s, num_steps, num_tokens):
    """The rows [bos, eos) of a sequence and its steps [first, last), inside the tensors whatever the boundaries."""
    bos, eos = rows_of(cu_seqlens, i_s, num_tokens)
    first, last = steps_of(step_ends, num_steps, bos, eos)
    return bos, eos, first, last


@triton.jit
def boundary(cu_seqlens, i_s, m_s, num_tokens):
    """cu_seqlens[i_s], clamped into [0, T]."""
    t = tl.load(cu_seqlens + i_s, m_s, 0).to(tl.int64)
    return tl.minimum(tl.maximum(t, 0), num_tokens)


@triton.jit
def sequence_at(cu_seqlens, i_slot, num_sequences, num_halvings, num_tokens, ROWS: tl.constexpr):
    """The last sequence whose slots begin at `i_slot` or before it; num_sequences behind those of all.

    The first ROWS rows of sequence s have slot s + cu_seqlens[s] // ROWS, those behind them the next: no two share one.
    """
    low = i_slot * 0
    high = low + num_sequences
    for _ in range(0, num_halvings):
        m_open = low < high
        i_next = (low + high) // 2 + 1
        m_below = m_open & (i_next + boundary(cu_seqlens, i_next, m_open, num_tokens) // ROWS <= i_slot)
        low = tl.where(m_below, i_next, low)
        high = tl.where(m_open & ~m_below, i_next - 1, high)
    return low
