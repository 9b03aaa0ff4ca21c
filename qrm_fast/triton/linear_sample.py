"""Triton kernels of linear_sample: a token per row of a vocabulary head's distribution, and its log-probability.

The fold of linear_logprobs also writes maximum and sum of a split after each of its blocks of BV columns, 8 bytes per
row and block. One program per row then looks its place up among the splits, among the blocks of one split, and in the
columns of one block, which it multiplies again: a tile of the BT rows that the fold multiplied, by the same steps of
the depth, so that the row's logit has the same bits. The statistics are merged as for linear_logprobs, hence the same
bits of the log-probability. 2 R D V FLOP, and BT BV / V of that once more. Block sizes have been compiled, not yet
timed on a GPU.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ..ops.linear_sample import _linear_sample
from .linear_logprobs import fold, fold_blocks, merge
from .logits import SPLIT, Head, load_temperature, logits, per_row
from .product import describable, operand


@triton.jit
def mass(p_max, p_sum, top):
    """What the columns of these statistics add to the distribution function, which ends at the mass of all of them."""
    total = tl.load(p_sum).to(tl.float64)
    return tl.where(total > 0, tl.exp((tl.load(p_max) - top).to(tl.float64)) * total, 0.0)


@triton.jit
def advanced(i, upto, goal, found, reached, below):
    """A step of the search for the piece that takes `reached` beyond the goal, or else the last that adds to it."""
    m_adds = (reached <= goal) & (upto > reached)
    return tl.where(m_adds, i, found), tl.where(m_adds, upto, reached), tl.where(m_adds, reached, below)


@triton.jit(do_not_specialize=["stride_statistics", "stride_running", "num_rows"])
def linear_sample_rows(
    hidden,  # [R, D]
    weight,  # [V, D]
    bias,  # [V] or None
    temperatures,  # [R] or None
    softcap,  # or None
    uniforms,  # [R] float64
    statistics,  # [3, splits, R]
    running,  # [2, blocks of columns, R]
    tokens,  # [R]
    token_logits,  # [R]
    stride_hidden,
    stride_weight,
    stride_statistics,
    stride_running,
    num_rows,
    vocab,
    dim,
    num_splits,
    DESCRIBED: tl.constexpr,
    SPLIT: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
):
    i_row = tl.program_id(0)
    p_max, p_sum = statistics + i_row, statistics + stride_statistics + i_row
    top = tl.full([], float("-inf"), tl.float32)
    p = p_max
    for _ in range(0, num_splits):
        top = tl.maximum(top, tl.load(p))
        p += num_rows
    goal = tl.full([], 0.0, tl.float64)
    p, p2 = p_max, p_sum
    for _ in range(0, num_splits):
        goal += mass(p, p2, top)
        p += num_rows
        p2 += num_rows
    u = tl.load(uniforms + i_row)
    goal *= tl.where(u >= 0, tl.minimum(u, 1.0), 0.0)

    i_split = tl.full([], 0, tl.int32)
    reached = tl.full([], 0.0, tl.float64)
    start = tl.full([], 0.0, tl.float64)
    p, p2 = p_max, p_sum
    for i in range(0, num_splits):
        i_split, reached, start = advanced(i, reached + mass(p, p2, top), goal, i_split, reached, start)
        p += num_rows
        p2 += num_rows
    first = i_split * (SPLIT // BV)
    found, reached, below = first, start, start
    p = running + first.to(tl.int64) * num_rows + i_row
    p2 = p + stride_running
    for i in range(first, tl.minimum(first + SPLIT // BV, tl.cdiv(vocab, BV))):
        found, reached, below = advanced(i, start + mass(p, p2, top), goal, found, reached, below)
        p += num_rows
        p2 += num_rows

    i_t = i_row // BT * BT
    o_t, o_v = i_t + tl.arange(0, BT), tl.arange(0, BC)
    b_temperature = load_temperature(temperatures, o_t, o_t < num_rows)
    rows, columns = (hidden, stride_hidden, num_rows, dim), (weight, stride_weight, vocab, dim)
    token = found * BV
    token_logit = tl.full([], float("nan"), tl.float32)
    for i_v in range(found * BV, tl.minimum(found * BV + BV, vocab), BC):
        b_z = logits(rows, columns, bias, softcap, b_temperature, i_t, i_v, DESCRIBED, BT, BC, BD)
        b_own = tl.sum(tl.where((o_t == i_row)[:, None], b_z, 0.0), 0)  # [BC]
        b_p = tl.exp((b_own - top).to(tl.float64))
        b_p = tl.where(b_p > 0, b_p, 0.0)
        b_upto = below + tl.cumsum(b_p, 0)
        i_first = tl.min(tl.where((b_p > 0) & (b_upto > goal), o_v, BC), 0)
        i_last = tl.max(tl.where(b_p > 0, o_v, -1), 0)
        i_column = tl.where(i_first < BC, i_first, i_last)
        m_found = (below <= goal) & (i_column >= 0)
        token = tl.where(m_found, i_v + i_column, token)
        token_logit = tl.where(m_found, tl.sum(tl.where(o_v == i_column, b_own, 0.0), 0), token_logit)
        below += tl.sum(b_p, 0)
    tl.store(tokens + i_row, token)
    tl.store(token_logits + i_row, token_logit)


def forward(
    hidden: Tensor,
    weight: Tensor,
    uniforms: Tensor,
    bias: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    (num_rows, dim), vocab = hidden.shape, len(weight)
    token_logits = hidden.new_empty(num_rows, dtype=torch.float32)
    if num_rows == 0:
        return torch.empty_like(uniforms, dtype=torch.int64), token_logits
    with torch.cuda.device_of(hidden):
        tokens = torch.full_like(uniforms, -1, dtype=torch.int64)
        head = Head(hidden, weight, tokens, bias, per_row(temperature, temperatures, tokens), softcap)
        described = describable(hidden, weight)
        launch = fold_blocks(head, kept=False)
        columns = min(launch["BV"], 128)  # of a search; wider ones spill
        running = hidden.new_empty(2, triton.cdiv(vocab, launch["BV"]), num_rows, dtype=torch.float32)
        statistics = fold(head, token_logits, running=running)
        linear_sample_rows[(num_rows,)](
            operand(hidden, described, launch["BT"], launch["BD"]),
            operand(weight, described, columns, launch["BD"]),
            bias,
            head.temperatures,
            softcap,
            uniforms,
            statistics,
            running,
            tokens,
            token_logits,
            hidden.stride(0),
            weight.stride(0),
            statistics.stride(0),
            running.stride(0),
            num_rows,
            vocab,
            dim,
            statistics.shape[1],
            described,
            SPLIT,
            BC=columns,
            **launch,
        )
        return tokens, merge(statistics, token_logits, head, ignore_index=-1)[0]


_linear_sample.register_kernel("cuda")(forward)
