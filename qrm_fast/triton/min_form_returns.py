"""Triton kernel of min_form_returns: the returns of the steps of a sequence, one program per sequence.

Reads 4 to 12 bytes per step from L2 up to three times and writes 8; tokens, some 40 times as many, are step_rows' work.
A sequence finds its steps by binary search, so no other launch prepares them. Blocks of steps are cut from the first
step of a sequence and combined in order: a step's bits depend on its sequence. Everything is in double: there are few
steps, and PURE's softmax at temperature 0.1 is what a bfloat16 PRM loses most in.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ..ops.min_form_returns import _min_form_returns
from .search import steps_of

LAUNCH = {"BK": 64, "num_warps": 1}


@triton.jit
def add(a, b):
    return a + b


@triton.jit
def join(low, total, excess, other_low, other_total, other_excess):
    """Minimum of x, sum of exp(minimum - x) and of exp(minimum - x) (x - minimum) over a union of steps."""
    joint = tl.minimum(low, other_low)
    gap = tl.where(total > 0.0, low - joint, 0.0)
    other_gap = tl.where(other_total > 0.0, other_low - joint, 0.0)
    weight = tl.exp(-gap)
    other_weight = tl.exp(-other_gap)
    moved = tl.where(weight > 0.0, weight * (excess + total * gap), 0.0)
    other_moved = tl.where(other_weight > 0.0, other_weight * (other_excess + other_total * other_gap), 0.0)
    return joint, weight * total + other_weight * other_total, moved + other_moved


@triton.jit
def lowest_step(step_rewards, begin, end, num_steps, BK: tl.constexpr):
    """The lowest reward of steps [begin, end), the first step that has it, and whether one is not finite."""
    infinity = float("inf")
    b_low = tl.full([BK], infinity, tl.float64)
    b_worst = tl.full([BK], num_steps, tl.int64)
    b_broken = tl.full([BK], 0, tl.int32)
    for i_k in range(begin, end, BK):
        o_k = i_k + tl.arange(0, BK)
        b_r = tl.load(step_rewards + o_k, o_k < end, infinity).to(tl.float64)  # [BK]
        b_broken += tl.where((o_k < end) & (b_r - b_r != 0.0), 1, 0)
        b_worst = tl.where(b_r < b_low, o_k, b_worst)
        b_low = tl.minimum(b_low, b_r)
    low = tl.min(b_low, 0)
    return low, tl.min(tl.where(b_low == low, b_worst, num_steps), 0), tl.sum(b_broken, 0) > 0


@triton.jit(do_not_specialize=["num_steps"])
def min_form_returns(
    step_rewards,  # [K]
    step_ends,  # [K]
    cu_seqlens,  # [S+1]
    returns,  # [K] float64
    outcome,  # [S]
    worst_step,  # [S]
    num_steps,
    temperature: tl.float64,
    FORM: tl.constexpr,
    BK: tl.constexpr,
):
    i_s = tl.program_id(0)
    bos, eos = tl.load(cu_seqlens + i_s).to(tl.int64), tl.load(cu_seqlens + i_s + 1).to(tl.int64)
    begin, end = steps_of(step_ends, num_steps, bos, eos)
    low, worst, broken = lowest_step(step_rewards, begin, end, num_steps, BK)
    infinity = float("inf")
    zero = tl.sum(tl.zeros([BK], tl.float64), 0)

    total = zero + 1.0
    if FORM == "soft":
        b_total = tl.zeros([BK], tl.float64)
        for i_k in range(begin, end, BK):
            o_k = i_k + tl.arange(0, BK)
            b_r = tl.load(step_rewards + o_k, o_k < end, 0.0).to(tl.float64)
            b_total += tl.where(o_k < end, tl.exp((low - b_r) / temperature), 0.0)
        total = tl.sum(b_total, 0)

    # in reverse: the return of a step is that of its block from it on, joined with what follows the block
    carry = zero
    carry_low = zero + infinity
    carry_total = zero
    num_blocks = tl.cdiv(end - begin, BK)
    for i_b in range(0, num_blocks):
        o_k = begin + (num_blocks - 1 - i_b) * BK + tl.arange(0, BK)
        m_k = o_k < end
        b_r = tl.load(step_rewards + o_k, m_k, 0.0).to(tl.float64)  # [BK]
        if FORM == "causal_soft":
            # G = minimum + excess / total, in units of the temperature
            b_low = tl.where(m_k, b_r / temperature, infinity)
            b_scan = tl.associative_scan(
                (b_low, tl.where(m_k, 1.0, 0.0).to(tl.float64), b_r * 0.0), 0, join, reverse=True
            )
            b_from, b_weight, b_excess = join(b_scan[0], b_scan[1], b_scan[2], carry_low, carry_total, carry)
            b_return = (b_from + b_excess / b_weight) * temperature
            m_first = tl.arange(0, BK) == 0
            carry_low = tl.sum(tl.where(m_first, b_from, 0.0), 0)
            carry_total = tl.sum(tl.where(m_first, b_weight, 0.0), 0)
            carry = tl.sum(tl.where(m_first, b_excess, 0.0), 0)
        else:
            b_term = tl.where(m_k, b_r, 0.0)
            if FORM == "soft":
                b_term = tl.where(m_k, tl.exp((low - b_r) / temperature) * b_r, 0.0)
            b_return = (tl.associative_scan(b_term, 0, add, reverse=True) + carry) / total
            carry += tl.sum(b_term, 0)
        b_return = tl.where(broken, float("nan"), b_return)
        tl.store(returns + o_k, b_return, m_k)
        tl.store(outcome + i_s + o_k * 0, b_return.to(tl.float32), m_k & (o_k == begin))
    if begin >= end:
        tl.store(outcome + i_s, 0.0)
    tl.store(worst_step + i_s, tl.where(broken | (begin >= end), -1, worst))


def launch(
    step_rewards: Tensor, step_ends: Tensor, cu_seqlens: Tensor, num_tokens: int, form: str, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    num_steps, num_sequences = step_rewards.shape[0], cu_seqlens.shape[0] - 1
    returns = step_rewards.new_empty(num_steps, dtype=torch.float64)
    outcome = step_rewards.new_empty(num_sequences, dtype=torch.float32)
    worst_step = step_rewards.new_empty(num_sequences, dtype=torch.int64)
    # beyond these limits hard, revmin and the mean are exact
    temperature = min(max(temperature, 1e-30), 1e30)
    if num_sequences:
        with torch.cuda.device_of(step_rewards):
            min_form_returns[(num_sequences,)](
                step_rewards,
                step_ends,
                cu_seqlens,
                returns,
                outcome,
                worst_step,
                num_steps,
                temperature,
                FORM=form,
                **LAUNCH,
            )
    return returns, outcome, worst_step


_min_form_returns.register_kernel("cuda")(launch)
