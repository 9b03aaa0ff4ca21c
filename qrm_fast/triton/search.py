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
def count_below(bounds, num_bounds, num_halvings, b_row):
    """How many of the ascending `bounds` are below each row."""
    b_low = b_row * 0
    b_high = b_low + num_bounds
    for _ in range(0, num_halvings):
        m_open = b_low < b_high
        b_middle = (b_low + b_high) // 2
        m_below = m_open & (tl.load(bounds + b_middle, m_open, 0).to(tl.int64) < b_row)
        b_low = tl.where(m_below, b_middle + 1, b_low)
        b_high = tl.where(m_open & ~m_below, b_middle, b_high)
    return b_low


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
    """The steps [first, last) that end in rows [begin, end), by two searches at once: each waits for its own loads."""
    first = begin * 0
    first_high = first + num_steps
    last = first
    last_high = first_high
    while (first < first_high) | (last < last_high):
        middle = (first + first_high) // 2
        last_middle = (last + last_high) // 2
        before = tl.load(step_ends + middle, first < first_high, 0).to(tl.int64) < begin
        last_before = tl.load(step_ends + last_middle, last < last_high, 0).to(tl.int64) < end
        first_high = tl.where(before, first_high, middle)
        last_high = tl.where(last_before, last_high, last_middle)
        first = tl.where(before & (first < first_high), middle + 1, first)
        last = tl.where(last_before & (last < last_high), last_middle + 1, last)
    return first, tl.maximum(first, last)


@triton.jit
def sequence_bounds(step_ends, cu_seqlens, i_s, num_steps, num_tokens):
    """The rows [bos, eos) of a sequence and its steps [first, last), inside the tensors whatever the boundaries."""
    begin, end = tl.load(cu_seqlens + i_s).to(tl.int64), tl.load(cu_seqlens + i_s + 1).to(tl.int64)
    first, last = steps_of(step_ends, num_steps, begin, end)
    bos = tl.minimum(tl.maximum(begin, 0), num_tokens)
    return bos, tl.minimum(tl.maximum(end, bos), num_tokens), first, last


@triton.jit
def boundary(cu_seqlens, i_s, m_s, num_tokens):
    """cu_seqlens[i_s], clamped into [0, T]."""
    t = tl.load(cu_seqlens + i_s, m_s, 0).to(tl.int64)
    return tl.minimum(tl.maximum(t, 0), num_tokens)


@triton.jit
def sequence_at(cu_seqlens, o, b_low, b_high, num_halvings, num_tokens, ROWS: tl.constexpr):
    """The sequence in [b_low, b_high] that has row `o` (ROWS = 0), or that has slot `o` for ROWS of its rows.

    A sequence's last ROWS rows have slot s + cu_seqlens[s] // ROWS, those before them the next: no two share one.
    """
    for _ in range(0, num_halvings):
        m_open = b_low < b_high
        i_next = (b_low + b_high) // 2 + 1
        b_first = boundary(cu_seqlens, i_next, m_open, num_tokens)
        if ROWS > 0:
            b_first = i_next + b_first // ROWS
        m_below = m_open & (b_first <= o)
        b_low = tl.where(m_below, i_next, b_low)
        b_high = tl.where(m_open & ~m_below, i_next - 1, b_high)
    return b_low
