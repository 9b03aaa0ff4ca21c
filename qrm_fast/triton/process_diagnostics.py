"""Triton kernels of process_diagnostics: two launches, one over sequences, one over what they found.

Reads 4 to 12 bytes per step from L2 twice and, for the shares of |A|, 4 bytes per row once; nothing of length K or T is
written. A program reads the steps of one sequence, ROW_SPLITS of them share its rows; a single program adds up the
sequences in order. In float64, without atomics; block sizes have been compiled, not yet timed on a GPU.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ..ops.process_diagnostics import _process_diagnostics
from .min_form_returns import lowest_step
from .process_advantages import ROW_SPLITS, SUMS
from .search import rows_of, steps_of

SEQUENCES = {"BS": 512, "num_warps": 4}


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "num_steps"])
def diagnose(
    step_rewards,  # [K]
    step_ends,  # [K]
    cu_seqlens,  # [S+1]
    advantages,  # [T] or None
    per_sequence,  # [3, S]
    is_few,  # [S, 2] float64: at most one step, fewer than min_tokens rows
    mass,  # [S, splits] float64: sum of |A|
    num_steps,
    num_tokens,
    num_sequences,
    min_tokens,
    temperature: tl.float64,
    BK: tl.constexpr,
    BT: tl.constexpr,
):
    i_s, i_p, num_splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    bos, eos = rows_of(cu_seqlens, i_s, num_tokens)
    if i_p == 0:
        first, last = steps_of(step_ends, num_steps, bos, eos)
        low, worst, broken = lowest_step(step_rewards, first, last, num_steps, BK)
        b_total = tl.zeros([BK], tl.float64)
        b_weighted = tl.zeros([BK], tl.float64)
        b_spread = tl.zeros([BK], tl.float64)
        for i_k in range(first, last, BK):
            o_k = i_k + tl.arange(0, BK)
            m_k = o_k < last
            b_r = tl.load(step_rewards + o_k, m_k, 0.0).to(tl.float64)
            b_excess = b_r - low
            b_x = tl.where(b_excess == 0.0, 0.0, b_excess / temperature)
            b_weight = tl.where(m_k, tl.exp(-b_x), 0.0)
            b_total += b_weight
            b_weighted += b_weight * b_r
            b_spread += tl.where(b_weight == 0.0, 0.0, b_weight * b_x)
        total = tl.sum(b_total, 0)
        # exp(entropy) = Z exp(sum of w x), with x = (r - minimum) / temperature and w = exp(-x) / Z
        effective = total * tl.exp(tl.sum(b_spread, 0) / total)
        position = (worst - first + 1).to(tl.float64) / (last - first)
        outcome = tl.sum(b_weighted, 0) / total
        nothing = tl.where(broken, float("nan"), 0.0)
        idle = broken | (first >= last)
        tl.store(per_sequence + i_s, tl.where(idle, nothing, outcome.to(tl.float32)))
        tl.store(per_sequence + num_sequences + i_s, tl.where(idle, nothing, position.to(tl.float32)))
        tl.store(per_sequence + 2 * num_sequences + i_s, tl.where(idle, nothing, effective.to(tl.float32)))
        tl.store(is_few + 2 * i_s, tl.where(last - first <= 1, 1.0, 0.0).to(tl.float64))
        tl.store(is_few + 2 * i_s + 1, tl.where(eos - bos < min_tokens, 1.0, 0.0).to(tl.float64))
    own_mass = tl.full([], 0.0, tl.float64)
    if advantages is not None:
        begin = bos + i_p * BT
        if begin < eos:
            b_mass = tl.zeros([BT], tl.float64)
            for i_t in range(begin, eos, num_splits * BT):
                o_t = i_t + tl.arange(0, BT)
                b_a = tl.abs(tl.load(advantages + o_t, o_t < eos, 0.0).to(tl.float64))
                b_mass += tl.where(b_a - b_a == 0.0, b_a, 0.0)
            own_mass = tl.sum(b_mass, 0)
    tl.store(mass + i_s * num_splits + i_p, own_mass)


@triton.jit(do_not_specialize=["num_sequences"])
def diagnose_shares(
    is_few,
    mass,
    shares,  # [4]
    num_sequences,
    SPLITS: tl.constexpr,
    BS: tl.constexpr,
):
    b_whole = tl.zeros([BS], tl.float64)
    b_one_step = tl.zeros([BS], tl.float64)
    b_short = tl.zeros([BS], tl.float64)
    b_one_step_mass = tl.zeros([BS], tl.float64)
    b_short_mass = tl.zeros([BS], tl.float64)
    for i in range(0, num_sequences, BS):
        o_s = (i + tl.arange(0, BS)).to(tl.int64)
        m_s = o_s < num_sequences
        b_mass = tl.zeros([BS], tl.float64)
        for i_p in tl.static_range(SPLITS):
            b_mass += tl.load(mass + o_s * SPLITS + i_p, m_s, 0.0)
        b_is_one_step, b_is_short = tl.load(is_few + 2 * o_s, m_s, 0.0), tl.load(is_few + 2 * o_s + 1, m_s, 0.0)
        b_whole += b_mass
        b_one_step += b_is_one_step
        b_short += b_is_short
        b_one_step_mass += b_is_one_step * b_mass
        b_short_mass += b_is_short * b_mass
    whole, answers = tl.sum(b_whole, 0), tl.maximum(num_sequences, 1).to(tl.float64)
    tl.store(shares, (tl.sum(b_one_step, 0) / answers).to(tl.float32))
    tl.store(shares + 1, (tl.sum(b_short, 0) / answers).to(tl.float32))
    tl.store(shares + 2, tl.where(whole > 0.0, tl.sum(b_one_step_mass, 0) / whole, 0.0).to(tl.float32))
    tl.store(shares + 3, tl.where(whole > 0.0, tl.sum(b_short_mass, 0) / whole, 0.0).to(tl.float32))


def launch(
    step_rewards: Tensor,
    step_ends: Tensor,
    cu_seqlens: Tensor,
    temperature: float,
    min_tokens: int,
    advantages: Tensor | None,
) -> tuple[Tensor, Tensor]:
    num_sequences = cu_seqlens.shape[0] - 1
    # without advantages nothing of length T is read, and only the boundaries say what T is
    num_tokens, splits = 2**62, 1
    if advantages is not None:
        num_tokens, splits = advantages.shape[0], ROW_SPLITS
    per_sequence = step_rewards.new_empty(3, num_sequences, dtype=torch.float32)
    shares = step_rewards.new_empty(4, dtype=torch.float32)
    is_few = step_rewards.new_empty(num_sequences, 2, dtype=torch.float64)
    mass = step_rewards.new_empty(num_sequences, splits, dtype=torch.float64)
    with torch.cuda.device_of(step_rewards):
        if num_sequences:
            diagnose[(num_sequences, splits)](
                step_rewards,
                step_ends,
                cu_seqlens,
                advantages,
                per_sequence,
                is_few,
                mass,
                step_rewards.shape[0],
                num_tokens,
                num_sequences,
                min_tokens,
                temperature,
                **SUMS,
            )
        diagnose_shares[(1,)](is_few, mass, shares, num_sequences, splits, **SEQUENCES)
    return per_sequence, shares


_process_diagnostics.register_kernel("cuda")(launch)
