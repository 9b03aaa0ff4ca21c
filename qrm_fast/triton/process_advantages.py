"""Triton kernels of process_advantages: what sequences contribute, what their groups compare, the levels of the steps.

Three launches, and a fourth that joins the moments where a preset whitens: one program per sequence sums its steps, the
first sequence of each group divides the sums of the others, one program per sequence levels the steps and counts what
whitening needs. Where rows carry a penalty a launch of its own counts them, as step_rows walks over them: a search in
16 rows, and 4 bytes read. Reads and writes some 50 bytes per step, of which there are 40 times fewer than tokens; rows
are read only where they carry a penalty, and only for whitening and verl's baseline. No index tensor, no row of T is
written; step_rows then writes the rows. In float64, in a fixed order, without atomics; block sizes have been compiled,
not yet timed on a GPU.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from ..ops.process_advantages import WHITENING, _process_advantages, _process_rows
from . import min_form_returns, step_rows
from .groups import LAUNCH as GROUP
from .groups import by_group, led_group, members
from .moments import BATCH_JOIN, BATCH_SPLITS, join_lanes, moments_join, no_rows, store_moments, with_rows
from .search import rows_of, sequence_bounds, steps_of
from .step_rows import RUN, next_row, unwoven, walk

SUMS = {"BK": 64, "BT": 256, "num_warps": 1}
ROW_SPLITS = 8  # programs that share the penalties of a sequence
LEVELS = {"BK": 64, "num_warps": 1}
MOMENTS = {"BT": 4096, "num_warps": 4, "maxnreg": 128}  # without the bound, ptxas spills on sm_80


@triton.jit
def step_bounds(step_ends, o_k, first, last, bos):
    """The first row of each step, and of the rows behind the last one for o_k = last; the row that ends the step."""
    m_k = (o_k >= first) & (o_k < last)
    b_begin = tl.load(step_ends + o_k - 1, (o_k > first) & (o_k <= last), 0).to(tl.int64) + 1
    return tl.where(o_k > first, b_begin, bos), tl.load(step_ends + o_k, m_k, 0).to(tl.int64)


@triton.jit
def outcome_of(outcome_rewards, has_answer, o_s, m_s):
    """The outcomes, 0 where none was asked for, and where one was."""
    b_outcome = (o_s * 0).to(tl.float64)
    m_asked = m_s & (o_s < 0)
    if outcome_rewards is not None:
        m_asked = m_s
        if has_answer is not None:
            m_asked = m_s & (tl.load(has_answer + o_s, m_s, 0) != 0)
        b_outcome = tl.load(outcome_rewards + o_s, m_asked, 0.0).to(tl.float64)
    return b_outcome, m_asked


@triton.jit(do_not_specialize=["num_tokens", "num_steps"])
def process_sums(
    returns,  # [K] float64
    step_ends,  # [K]
    cu_seqlens,  # [S+1]
    outcome_rewards,  # [S] or None
    has_answer,  # [S] or None
    penalty,  # [T] or None
    process,  # [S] float64: the return of the first step, 0 without steps
    numerators,  # [S, splits] float64: what a group's baseline adds up; NaN where the sequence has nothing to compare
    num_steps,
    num_tokens,
    max_gen_len: tl.float64,
    process_coef: tl.float64,
    outcome_coef: tl.float64,
    PRESET: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
):
    i_s, i_p, num_splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    bos, eos = rows_of(cu_seqlens, i_s, num_tokens)
    share = tl.full([], 0.0, tl.float64)
    if i_p == 0:
        first, last = steps_of(step_ends, num_steps, bos, eos)
        start = tl.load(returns + first, first < last, 0.0)
        tl.store(process + i_s, start)
        if PRESET == "paper" or PRESET == "verl":
            # the return of every row, summed
            b_sum = tl.zeros([BK], tl.float64)
            for i_k in range(first, last, BK):
                o_k = i_k + tl.arange(0, BK)
                b_begin, b_end = step_bounds(step_ends, o_k, first, last, bos)
                b_sum += tl.load(returns + o_k, o_k < last, 0.0) * (b_end + 1 - b_begin)
            share = tl.sum(b_sum, 0)
        else:
            share = start
            if PRESET == "paper-step":
                share = start / (last - first)
        m_counts = first < last
        if PRESET == "verl":
            outcome, _ = outcome_of(outcome_rewards, has_answer, i_s, i_s >= 0)
            share = process_coef * share + outcome_coef * outcome * (eos - bos)
            m_counts = bos < eos
        share = tl.where(m_counts, share, float("nan"))
    if PRESET == "verl" and penalty is not None:
        begin = bos + i_p * BT
        if begin < eos:  # most sequences need fewer programs
            b_kl = tl.zeros([BT], tl.float64)
            for i_t in range(begin, eos, num_splits * BT):
                o_t = i_t + tl.arange(0, BT)
                b_kl += tl.load(penalty + o_t, o_t < eos, 0.0).to(tl.float64)
            share -= tl.sum(b_kl, 0)
    if PRESET == "paper" or PRESET == "verl":
        share /= max_gen_len
    tl.store(numerators + i_s * num_splits + i_p, share)


@triton.jit
def shares(cu_seqlens, outcome_rewards, has_answer, numerators, o_s, m_s, PRESET: tl.constexpr, SPLITS: tl.constexpr):
    """What sequences add to the two baselines of their group, numerators and denominators, 0 where they do not count;
    the outcomes and where one was asked for."""
    b_process = (o_s * 0).to(tl.float64)
    for i_p in tl.static_range(SPLITS):
        b_process += tl.load(numerators + o_s * SPLITS + i_p, m_s, 0.0)
    m_process = m_s & (b_process - b_process == 0.0)
    b_length = tl.load(cu_seqlens + o_s + 1, m_s, 0).to(tl.int64) - tl.load(cu_seqlens + o_s, m_s, 0).to(tl.int64)
    b_size = b_length.to(tl.float64) if PRESET == "openrlhf" else (o_s * 0 + 1).to(tl.float64)
    b_outcome, m_asked = outcome_of(outcome_rewards, has_answer, o_s, m_s)
    m_outcome = m_asked & (b_length > 0) & (b_outcome - b_outcome == 0.0)
    b_process, b_size = tl.where(m_process, b_process, 0.0), tl.where(m_process, b_size, 0.0)
    b_solved, b_answers = tl.where(m_outcome, b_outcome, 0.0), tl.where(m_outcome, 1.0, 0.0).to(tl.float64)
    return b_process, b_size, b_solved, b_answers, b_outcome, m_asked


@triton.jit(do_not_specialize=["num_sequences"])
def process_baselines(
    ids,  # [S], of by_group
    order,  # [S] or None
    cu_seqlens,
    outcome_rewards,
    has_answer,
    process,
    numerators,
    base,  # [S] float64
    baseline,  # [S] float64: of the process rewards
    num_sequences,
    process_coef: tl.float64,
    outcome_coef: tl.float64,
    PRESET: tl.constexpr,
    SPLITS: tl.constexpr,
    BS: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    i_s, group, inside, end = led_group(ids, order, i, num_sequences, BS)
    tl.store(base + i_s, float("nan"), ~inside)
    tl.store(baseline + i_s, float("nan"), ~inside)

    b_sums = tl.zeros([BS], tl.float64)
    b_sizes = tl.zeros([BS], tl.float64)
    b_solved = tl.zeros([BS], tl.float64)
    b_answers = tl.zeros([BS], tl.float64)
    for begin in range(i, end, BS):
        o_s, m_s = members(ids, order, begin, end, group, BS)
        b_own, b_size, b_own_solved, b_own_answers, _, _ = shares(
            cu_seqlens, outcome_rewards, has_answer, numerators, o_s, m_s, PRESET, SPLITS
        )
        b_sums += b_own
        b_sizes += b_size
        b_solved += b_own_solved
        b_answers += b_own_answers
    total, size, solved, answers = tl.sum(b_sums, 0), tl.sum(b_sizes, 0), tl.sum(b_solved, 0), tl.sum(b_answers, 0)

    # The mean of the others. openrlhf shifts outcomes to {-1, 0}, which shows only where there are none.
    alone = 1.0 if PRESET == "openrlhf" else 0.0
    for begin in range(i, end, BS):
        o_s, m_s = members(ids, order, begin, end, group, BS)
        b_own, b_size, b_own_solved, b_own_answers, b_outcome, m_asked = shares(
            cu_seqlens, outcome_rewards, has_answer, numerators, o_s, m_s, PRESET, SPLITS
        )
        b_others = size - b_size
        b_baseline = tl.where(b_others > 0.0, (total - b_own) / b_others, 0.0)
        if PRESET == "verl":
            b_base = outcome_coef * b_outcome - b_baseline
        else:
            b_others = answers - b_own_answers
            b_solved = tl.where(b_others > 0.0, (solved - b_own_solved) / b_others, alone)
            b_base = tl.where(m_asked, outcome_coef * (b_outcome - b_solved), 0.0)
            if PRESET == "paper":
                b_base -= tl.where(b_size > 0.0, process_coef * b_baseline, 0.0)
        # NaN where a step reward is not finite
        b_start = tl.load(process + o_s, m_s, 0.0)
        tl.store(base + o_s, b_base + (b_start - b_start), m_s)
        tl.store(baseline + o_s, b_baseline, m_s)


@triton.jit
def level_steps(
    returns,
    step_ends,
    o_k,
    first,
    last,
    bos,
    last_end,
    base,
    baseline,
    process_coef,
    PRESET: tl.constexpr,
):
    """Advantages of steps without penalty, of the rows behind the last for o_k = last; where each begins and ends."""
    b_begin, b_end = step_bounds(step_ends, o_k, first, last, bos)
    b_level = tl.load(returns + o_k, (o_k >= first) & (o_k < last), 0.0)
    # the baseline once for each step from this one on, or for each of their rows that does not end one
    b_remaining = last - o_k
    if PRESET == "paper-step":
        b_level -= baseline * b_remaining
    elif PRESET == "openrlhf":
        b_level -= baseline * (last_end + 1 - b_begin - b_remaining)
    return tl.where(o_k < last, process_coef * b_level + base, base), b_begin, b_end


@triton.jit
def store_parts(parts, i_p, lanes, b_zeros):
    """The moments of a program's rows, and how many it leaves at 0."""
    count, mean, m2 = join_lanes(lanes)
    p_part = parts + i_p.to(tl.int64) * 3
    store_moments(p_part, count, mean, m2, True)
    store_moments(p_part + tl.num_programs(0).to(tl.int64) * 3, tl.sum(b_zeros, 0).to(tl.float64), 0.0, 0.0, True)


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "num_steps"])
def process_levels(
    returns,
    step_ends,
    cu_seqlens,
    base,
    baseline,
    levels,  # [K] float64
    parts,  # [2, programs, 3] float64: moments of the rows that count; how many are left at 0. [2, 3], 0, without any
    num_steps,
    num_tokens,
    num_sequences,
    process_coef: tl.float64,
    PRESET: tl.constexpr,
    MOMENTS: tl.constexpr,
    MASK_STEP_ENDS: tl.constexpr,
    BK: tl.constexpr,
):
    i_p = tl.program_id(0)
    lanes = no_rows(BK)
    b_zeros = tl.zeros([BK], tl.int64)
    for i_s in range(i_p, num_sequences, tl.num_programs(0)):
        bos, eos, first, last = sequence_bounds(step_ends, cu_seqlens, i_s, num_steps, num_tokens)
        own_base, own_baseline = tl.load(base + i_s), tl.load(baseline + i_s)
        last_end = tl.load(step_ends + last - 1, first < last, 0).to(tl.int64)
        for i_k in range(first, last + 1, BK):
            o_k = i_k + tl.arange(0, BK)
            b_x, b_begin, b_end = level_steps(
                returns, step_ends, o_k, first, last, bos, last_end, own_base, own_baseline, process_coef, PRESET
            )
            tl.store(levels + o_k, b_x, o_k < last)
            if MOMENTS:
                b_rows = tl.where(o_k < last, b_end + 1 - b_begin, eos - b_begin)
                m_k = (o_k <= last) & (b_x - b_x == 0.0)
                if PRESET == "openrlhf":
                    b_zeros += tl.where(m_k & (b_x == 0.0), b_rows, 0)
                    m_k = m_k & (b_x != 0.0)
                    if MASK_STEP_ENDS:
                        b_zeros += tl.where(m_k & (o_k < last), 1, 0)
                if MASK_STEP_ENDS:
                    b_rows -= tl.where(o_k < last, 1, 0)
                lanes = with_rows(lanes, b_x, m_k & (b_rows > 0), b_rows.to(tl.float64))
    if MOMENTS:
        store_parts(parts, i_p, lanes, b_zeros)
    else:
        tl.store(parts + tl.arange(0, 8), 0.0, (tl.arange(0, 8) < 6) & (i_p == 0))


@triton.jit(do_not_specialize=["num_sequences", "num_steps"])
def process_moments(
    levels,
    base,
    step_ends,
    cu_seqlens,
    penalty,
    parts,  # [2, programs, 3], as in process_levels
    num_rows,
    num_steps,
    num_sequences,
    PRESET: tl.constexpr,
    MASK_STEP_ENDS: tl.constexpr,
    BT: tl.constexpr,
):
    i_p = tl.program_id(0)
    lanes = no_rows(BT // RUN)
    b_zeros = tl.zeros([BT // RUN], tl.int32)
    for begin in range(i_p.to(tl.int64) * BT, num_rows, tl.num_programs(0) * BT):
        first, first_s, b_first, b_k, b_s, around = walk(
            step_ends, cu_seqlens, begin, num_rows, num_steps, num_sequences, BT
        )
        o_t = begin + tl.arange(0, BT)
        b_penalty = unwoven(tl.load(penalty + o_t, o_t < num_rows, float("nan")))
        for j in tl.static_range(RUN):
            b_level, m_ends, b_k, b_s = next_row(levels + first, base + first_s, around, b_first + j, b_k, b_s)
            # NaN where it does not count
            b_x = b_level - b_penalty[j].to(tl.float64)
            if MASK_STEP_ENDS:
                b_x = tl.where(m_ends, b_level - b_level if PRESET == "openrlhf" else float("nan"), b_x)
            m_counted = b_x - b_x == 0.0
            if PRESET == "openrlhf":
                b_zeros += tl.where(b_x == 0.0, 1, 0)
                m_counted = m_counted & (b_x != 0.0)
            lanes = with_rows(lanes, b_x, m_counted, 1.0)
    store_parts(parts, i_p, lanes, b_zeros)


def launch(
    returns: Tensor,
    step_ends: Tensor,
    cu_seqlens: Tensor,
    group_ids: Tensor,
    outcome_rewards: Tensor | None,
    has_answer: Tensor | None,
    penalty: Tensor | None,
    num_tokens: int,
    preset: str,
    max_gen_len: float,
    process_coef: float,
    outcome_coef: float,
    mask_step_ends: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    num_steps, num_sequences = step_ends.shape[0], group_ids.shape[0]
    levels, base = torch.empty_like(returns), returns.new_empty(num_sequences)
    if num_sequences == 0:
        return levels, base, returns.new_zeros(2, 3)
    whitened = preset in WHITENING
    splits = ROW_SPLITS if penalty is not None and preset == "verl" else 1
    process, baseline = returns.new_empty(2, num_sequences)
    numerators = returns.new_empty(num_sequences, splits)
    programs, programs_of_rows = min(num_sequences, BATCH_SPLITS), 0
    if penalty is not None and whitened:
        programs_of_rows = min(triton.cdiv(num_tokens, MOMENTS["BT"]), BATCH_SPLITS)
    num_parts = programs_of_rows or programs
    stats = returns.new_empty(2, 3)
    parts = returns.new_empty(2, num_parts, 3) if whitened else stats
    steps = returns, step_ends, cu_seqlens
    outcomes = outcome_rewards, has_answer
    with torch.cuda.device_of(returns):
        ids, order = by_group(group_ids)
        process_sums[(num_sequences, splits)](
            *steps,
            *outcomes,
            penalty,
            process,
            numerators,
            num_steps,
            num_tokens,
            max_gen_len,
            process_coef,
            outcome_coef,
            PRESET=preset,
            **SUMS,
        )
        process_baselines[(num_sequences,)](
            ids,
            order,
            cu_seqlens,
            *outcomes,
            process,
            numerators,
            base,
            baseline,
            num_sequences,
            process_coef,
            outcome_coef,
            PRESET=preset,
            SPLITS=splits,
            **GROUP,
        )
        process_levels[(programs,)](
            *steps,
            base,
            baseline,
            levels,
            parts,
            num_steps,
            num_tokens,
            num_sequences,
            process_coef,
            PRESET=preset,
            MOMENTS=whitened and not programs_of_rows,
            MASK_STEP_ENDS=mask_step_ends,
            **LEVELS,
        )
        if programs_of_rows:
            process_moments[(programs_of_rows,)](
                levels,
                base,
                step_ends,
                cu_seqlens,
                penalty,
                parts,
                num_tokens,
                num_steps,
                num_sequences,
                PRESET=preset,
                MASK_STEP_ENDS=mask_step_ends,
                **MOMENTS,
            )
        if whitened:
            moments_join[(2,)](parts, stats, num_parts, **BATCH_JOIN)
    return levels, base, stats


def launch_rows(step_rewards: Tensor, *options) -> Tensor:
    """The launches of min_form_returns, those above and that of step_rows, without the dispatch between them."""
    *of_sequence, num_tokens, form, temperature, preset, max_gen_len, process_coef, outcome_coef, masked = options
    step_ends, cu_seqlens, _, _, _, penalty = of_sequence
    returns, _, _ = min_form_returns.launch(step_rewards, step_ends, cu_seqlens, num_tokens, form, temperature)
    of_step = preset, max_gen_len, process_coef, outcome_coef, masked
    levels, base, stats = launch(returns, *of_sequence, num_tokens, *of_step)
    to_whiten = (stats, WHITENING[preset]) if preset in WHITENING else (None, "")
    return step_rows.launch(levels, base, step_ends, cu_seqlens, penalty, *to_whiten, num_tokens, masked, wide=False)


_process_advantages.register_kernel("cuda")(launch)
_process_rows.register_kernel("cuda")(launch_rows)
