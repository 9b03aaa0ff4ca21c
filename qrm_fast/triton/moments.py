"""Triton kernels of moments: count, mean and sum of squared deviations in one read of the rows.

Reads every row once (5 bytes with a mask in fp32) and writes 24 bytes per set: memory decides the speed. A program
takes every `num_splits`-th block of a set's rows, counted from the set's first row. Each lane adds up its rows about
the first of them that counts; lanes are joined once, at the end. A second launch joins a set's programs, a third the
sequences of each group. No atomics; the bits of a sequence's moments depend on its own rows alone. In float64, where
the mean of equal float32 values is exact. Block sizes have been compiled, not yet timed on a GPU.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ..ops.moments import _moments
from .groups import LAUNCH as GROUP
from .groups import by_group, led_group, members

ROWS = {"BT": 512, "num_warps": 2}
SEQUENCE_ROWS = {"BT": 256, "num_warps": 1}
BATCH_SPLITS = 1024  # programs that share one set of all rows
SEQUENCE_SPLITS = 4  # a constant: a sequence's bits must not depend on the batch
BATCH_JOIN = {"BP": BATCH_SPLITS, "num_warps": 8}
SEQUENCE_JOIN = {"BP": SEQUENCE_SPLITS, "num_warps": 1}


@triton.jit
def with_block(count, mean, m2, b_x, b_n):
    """Moments joined with those of a block of finite values, each counted b_n times, about the block's own mean."""
    own_count = tl.sum(b_n, 0)
    own_mean = tl.sum(b_n * b_x, 0) / tl.maximum(own_count, 1.0)
    b_deviation = tl.where(b_n > 0.0, b_x - own_mean, 0.0)
    distance = own_mean - mean
    share = own_count / tl.maximum(count + own_count, 1.0)
    m2 += tl.sum(b_n * b_deviation * b_deviation, 0) + distance * distance * count * share
    return count + own_count, mean + distance * share, m2


@triton.jit
def no_rows(B: tl.constexpr):
    """Of each lane's rows: how many count, the first that does, sums of deviations from it and of their squares."""
    b_zero = tl.zeros([B], tl.float64)
    return b_zero, b_zero, b_zero, b_zero


@triton.jit
def with_rows(lanes, b_x, m, b_n):
    """Lanes with one more value each, counted b_n times, where m."""
    b_count, b_origin, b_sum, b_squares = lanes
    b_origin = tl.where(m & (b_count == 0.0), b_x, b_origin)
    b_deviation = tl.where(m, b_x - b_origin, 0.0)
    b_times = b_n * b_deviation
    return b_count + tl.where(m, b_n, 0.0), b_origin, b_sum + b_times, tl.fma(b_times, b_deviation, b_squares)


@triton.jit
def join_lanes(lanes):
    """Count, mean and sum of squared deviations of all lanes' rows."""
    b_count, b_origin, b_sum, b_squares = lanes
    b_shift = b_sum / tl.maximum(b_count, 1.0)
    zero = tl.full([], 0.0, tl.float64)
    count, mean, m2 = with_block(zero, zero, zero, b_origin + b_shift, b_count)
    return count, mean, m2 + tl.sum(tl.maximum(b_squares - b_sum * b_shift, 0.0), 0)


@triton.jit
def store_moments(p_set, count, mean, m2, m_set):
    tl.store(p_set, count, m_set)
    tl.store(p_set + 1, mean, m_set)
    tl.store(p_set + 2, m2, m_set)


@triton.jit
def moments_rows(
    x,  # [T]
    mask,  # [T] or None
    cu_seqlens,  # [K+1] or None: one set of all rows
    parts,  # [K, num_splits, 3]
    num_rows,
    BT: tl.constexpr,
):
    i_k, i_p, num_splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    bos = tl.full([], 0, tl.int64)
    eos = bos + num_rows
    if cu_seqlens is not None:
        # Boundaries that a CPU kernel would refuse must not be read beyond the tensors.
        bos = tl.maximum(tl.load(cu_seqlens + i_k).to(tl.int64), 0)
        eos = tl.minimum(tl.load(cu_seqlens + i_k + 1).to(tl.int64), num_rows)
    p_part = parts + (i_k * num_splits + i_p) * 3
    if bos + i_p * BT >= eos:
        store_moments(p_part, 0.0, 0.0, 0.0, True)
        return
    lanes = no_rows(BT)
    for i_t in range(bos + i_p * BT, eos, num_splits * BT):
        o_t = i_t + tl.arange(0, BT)
        m_t = o_t < eos
        b_x = tl.load(x + o_t, m_t, float("nan")).to(tl.float64)
        m_finite = b_x - b_x == 0.0
        if mask is not None:
            m_finite = m_finite & (tl.load(mask + o_t, m_t, 0) != 0)
        lanes = with_rows(lanes, b_x, m_finite, 1.0)
    count, mean, m2 = join_lanes(lanes)
    store_moments(p_part, count, mean, m2, True)


@triton.jit(do_not_specialize=["num_splits"])
def moments_join(
    parts,  # [K, num_splits, 3]
    sets,  # [K, 3]
    num_splits,
    BP: tl.constexpr,
):
    i_k, o_p = tl.program_id(0).to(tl.int64), tl.arange(0, BP)
    m_p = o_p < num_splits
    p_parts = parts + (i_k * num_splits + o_p) * 3
    b_count = tl.load(p_parts, m_p, 0.0)
    b_mean = tl.load(p_parts + 1, m_p, 0.0)
    b_m2 = tl.load(p_parts + 2, m_p, 0.0)
    count = tl.sum(b_count, 0)
    # About the mean of a part that counts: exact where all means agree.
    origin = tl.max(tl.where(b_count > 0.0, b_mean, -float("inf")), 0)
    b_distance = tl.where(b_count > 0.0, b_mean - origin, 0.0)
    mean = tl.where(count > 0.0, origin + tl.sum(b_count * b_distance, 0) / count, 0.0)
    m2 = tl.sum(b_m2 + b_count * (b_mean - mean) * (b_mean - mean), 0)
    store_moments(sets + i_k * 3, count, mean, m2, True)


@triton.jit(do_not_specialize=["num_sequences"])
def moments_of_groups(
    sets,  # [S, 3]
    ids,  # [S], of by_group
    order,  # [S] or None
    joint,  # [S, 3]: of the whole group that each sequence belongs to
    num_sequences,
    BS: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    i_s, group, inside, end = led_group(ids, order, i, num_sequences, BS)
    count = tl.full([], 0.0, tl.float64)
    mean = tl.full([], 0.0, tl.float64)
    m2 = tl.full([], 0.0, tl.float64)
    for begin in range(i, end, BS):
        o_s, m_s = members(ids, order, begin, end, group, BS)
        b_count, b_mean = tl.load(sets + o_s * 3, m_s, 0.0), tl.load(sets + o_s * 3 + 1, m_s, 0.0)
        count, mean, m2 = with_block(count, mean, m2, b_mean, b_count)
        m2 += tl.sum(tl.load(sets + o_s * 3 + 2, m_s, 0.0), 0)
    for begin in range(i, end, BS):
        o_s, m_s = members(ids, order, begin, end, group, BS)
        store_moments(joint + o_s * 3, count, mean, m2, m_s)
    nan = tl.where(inside, 0.0, float("nan")).to(tl.float64)
    store_moments(joint + i_s * 3, nan, nan, nan, ~inside)


def launch(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, group_ids: Tensor | None) -> Tensor:
    num_rows = x.shape[0]
    if cu_seqlens is None:
        rows, join = ROWS, BATCH_JOIN
        num_sets, num_splits = 1, min(max(triton.cdiv(num_rows, ROWS["BT"]), 1), BATCH_SPLITS)
    else:
        rows, join = SEQUENCE_ROWS, SEQUENCE_JOIN
        num_sets, num_splits = cu_seqlens.shape[0] - 1, SEQUENCE_SPLITS
    parts = x.new_empty(num_sets, num_splits, 3, dtype=torch.float64)
    sets = x.new_empty(num_sets, 3, dtype=torch.float64)
    if num_sets:
        with torch.cuda.device_of(x):
            moments_rows[(num_sets, num_splits)](x, mask, cu_seqlens, parts, num_rows, **rows)
            moments_join[(num_sets,)](parts, sets, num_splits, **join)
            if group_ids is not None:
                ids, order = by_group(group_ids)
                of_sequences, sets = sets, torch.empty_like(sets)
                moments_of_groups[(num_sets,)](of_sequences, ids, order, sets, num_sets, **GROUP)
    return sets


_moments.register_kernel("cuda")(launch)
