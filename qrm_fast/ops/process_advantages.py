"""Token advantages from process rewards and verifiable outcomes, as PURE and its two codes compute them."""

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import BOOL, INTS, Checker
from .constant_op import constant_op
from .discounted_returns import discounted_returns
from .dtypes import acc_dtype
from .min_form_returns import _min_form_returns, check_steps, form_of
from .moments import join_ranks, moments
from .segments import group_sum, sequence_ids, sequence_sum
from .step_rows import step_rows

PRESETS = ("paper", "paper-step", "openrlhf", "verl")
WHITENING = {"openrlhf": "nonzero", "verl": "unbiased"}  # of step_rows


def process_advantages(
    step_rewards: Tensor,
    step_ends: Tensor,
    cu_seqlens: Tensor,
    group_ids: Tensor,
    *,
    outcome_rewards: Tensor | None = None,
    has_answer: Tensor | None = None,
    preset: str = "paper",
    operator: str = "soft",
    temperature: float = 0.1,
    max_gen_len: int | None = None,
    kl: Tensor | None = None,
    process_coef: float | None = None,
    outcome_coef: float | None = None,
    mask_step_ends: bool | None = None,
    num_tokens: int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The advantage of every row, [T] float32 (float64 for float64), from step rewards and verified answers.

    `step_rewards`, `step_ends`: [K] as in `min_form_returns`, whose `operator` and `temperature` make the returns G.
    `cu_seqlens`: [S+1] int32 or int64. `group_ids`: [S] int32 or int64 in [0, S), the answers to one prompt.
    `outcome_rewards`: [S], 1 where the verifier accepts the answer, 0 elsewhere; None: no outcome stream. `has_answer`:
    [S] bool, False where the prompt has no answer to verify. `kl`: [T], the penalty of each row, its coefficient
    included. `outcome_rewards` and `kl` have the result's dtype.

    With v the outcomes, c_p and c_o the two coefficients, "others" the other sequences of the group, S_k the return of
    the first of the n_k steps of sequence k (its soft minimum), L_k its rows, N = max_gen_len and n - t + 1 the steps
    from step t on (PURE, arXiv 2504.15275):

        paper       c_o (v_i - mean of others' v) + c_p (G_t - b)                 eq. 7
                    b = sum over others and their rows of G / (N * number of others)
        paper-step  c_o (v_i - mean of others' v) + c_p (G_t - b (n - t + 1))     eq. 8
                    b = mean of others' S_k / n_k
        openrlhf    c_o (v_i - mean of others' v) + c_p (G_t - b m_t)             the authors' OpenRLHF code
                    b = sum of others' S_k / sum of others' L_k, m_t the rows from step t on that do not end a step;
                    then 0 on every row of step_ends, then whitened: mean over the rows that are not 0, population
                    variance around it of all rows over the count of those, at least 1e-8; a row of 0 stays 0
        verl        c_p G_t + c_o v_i - b                                         the authors' verl code, March 2025
                    b = sum over others and their rows of (c_p G + c_o v - KL to go) / (N * number of others);
                    then whitened: (A - mean) / sqrt(variance + 1e-8), the variance with n - 1

    The rows after a sequence's last step have G = 0 and nothing left to subtract a per-step or per-row b from. From
    every row of every preset the sum of `kl` over the rest of the sequence is subtracted before the whitening. A
    coefficient of None is the preset's, 1 in all of them; `mask_step_ends` of None is the preset's, True for openrlhf
    alone (the rows then also stay out of verl's whitening). `max_gen_len` is needed by paper and verl and read by no
    other preset. Whitening is joined over the ranks of `process_group` if given; groups are those of this call.

    A baseline without others to compare with is 0. A sequence without steps has no process part (in verl: G = 0) and
    one without an answer no outcome part (in verl: v = 0); neither counts among the others, and nor does an empty
    sequence. The lone answer to a prompt keeps v, or v - 1 in openrlhf, which shifts v to {-1, 0}. A step reward or an
    outcome that is not finite makes its own sequence NaN, which baselines and whitening then leave out. Computed in
    float64, rounded once. Not differentiable.

    `num_tokens` is T; None takes it from `kl`, else reads cu_seqlens[-1], which waits for the device on CUDA. Raises
    TypeError or ValueError for a wrong dtype, shape or device, an unknown option, a max_gen_len that is missing or not
    positive, has_answer without outcome_rewards, and, on CPU, ValueError where cu_seqlens do not start at 0, decrease,
    or do not end at T, step_ends do not ascend within [0, T), or a group id is out of range (on CUDA its sequence is
    NaN).
    """
    check = Checker()
    check_steps(check, step_rewards, step_ends, cu_seqlens)
    check("group_ids", group_ids, "S", INTS)
    acc = acc_dtype(step_rewards.dtype)
    if outcome_rewards is not None:
        check("outcome_rewards", outcome_rewards, "S", (acc,))
    if has_answer is not None:
        if outcome_rewards is None:
            raise ValueError("has_answer must be given with outcome_rewards only, got None for them")
        check("has_answer", has_answer, "S", BOOL)
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    if max_gen_len is None and preset in ("paper", "verl"):
        raise ValueError(f"max_gen_len must be given for preset {preset!r}, which divides by it, got None")
    if max_gen_len is not None and not max_gen_len > 0:
        raise ValueError(f"max_gen_len must be positive, got {max_gen_len}")
    form, temperature = form_of(operator, temperature)
    penalty = None
    if kl is not None:
        check("kl", kl, "T", (acc,))
        if num_tokens is not None and num_tokens != kl.shape[0]:
            raise ValueError(f"num_tokens must be the length of kl, {kl.shape[0]}, got {num_tokens}")
        num_tokens = kl.shape[0]
        penalty = discounted_returns(kl, cu_seqlens, gamma=1.0)
    elif num_tokens is None:
        num_tokens = int(cu_seqlens[-1])
    process_coef = 1.0 if process_coef is None else float(process_coef)
    outcome_coef = 1.0 if outcome_coef is None else float(outcome_coef)
    masked = preset == "openrlhf" if mask_step_ends is None else bool(mask_step_ends)

    of_step = (preset, float(max_gen_len or 1), process_coef, outcome_coef, masked)
    of_sequence = (step_ends, cu_seqlens, group_ids, outcome_rewards, has_answer, penalty, num_tokens)
    whitening = WHITENING.get(preset)
    if process_group is None or whitening is None:
        return _process_rows(step_rewards, *of_sequence, form, temperature, *of_step)
    returns, _, _ = _min_form_returns(step_rewards, step_ends, cu_seqlens, num_tokens, form, temperature)
    levels, base, stats = _process_advantages(returns, *of_sequence, *of_step)
    stats = join_ranks(stats, process_group)
    wide = step_rewards.dtype == torch.float64
    return step_rows(levels, base, step_ends, cu_seqlens, penalty, stats, whitening, num_tokens, masked, wide)


@constant_op("process_rows")
def _process_rows(
    step_rewards: Tensor,
    step_ends: Tensor,
    cu_seqlens: Tensor,
    group_ids: Tensor,
    outcome_rewards: Tensor | None,
    has_answer: Tensor | None,
    penalty: Tensor | None,
    num_tokens: int,
    form: str,
    temperature: float,
    preset: str,
    max_gen_len: float,
    process_coef: float,
    outcome_coef: float,
    mask_step_ends: bool,
) -> Tensor:
    """[T]: returns, their advantages and the rows, whitened over this call where the preset whitens."""
    returns, _, _ = _min_form_returns(step_rewards, step_ends, cu_seqlens, num_tokens, form, temperature)
    of_sequence = (step_ends, cu_seqlens, group_ids, outcome_rewards, has_answer, penalty, num_tokens)
    of_step = (preset, max_gen_len, process_coef, outcome_coef, mask_step_ends)
    levels, base, stats = _process_advantages(returns, *of_sequence, *of_step)
    wide = step_rewards.dtype == torch.float64
    to_whiten = (stats, WHITENING[preset]) if preset in WHITENING else (None, "")
    return step_rows(levels, base, step_ends, cu_seqlens, penalty, *to_whiten, num_tokens, mask_step_ends, wide)


@_process_rows.register_fake
def _(step_rewards, step_ends, cu_seqlens, group_ids, outcome_rewards, has_answer, penalty, num_tokens, *options):
    return step_rewards.new_empty(num_tokens, dtype=acc_dtype(step_rewards.dtype))


@constant_op("process_advantages")
def _process_advantages(
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
    """Advantages of the steps [K] and of the rows after them [S], and moments [2, 3] for whitening, float64.

    Before whitening and without the penalty, which the moments count in. Row 0: the rows that whitening counts; row 1:
    how many rows openrlhf leaves at 0.
    """
    num_steps, num_sequences = step_ends.shape[0], cu_seqlens.shape[0] - 1
    ends, cu = step_ends.to(torch.int64), cu_seqlens.to(torch.int64)
    step_cu = torch.searchsorted(ends, cu)
    n, length = step_cu.diff(), cu.diff()
    i_seq = sequence_ids(step_cu, num_steps).clamp(max=max(num_sequences - 1, 0))  # [K]
    begin = torch.cat([ends.new_zeros(1), ends + 1])[:-1].maximum(cu[i_seq])  # [K]
    remaining = step_cu[i_seq + 1] - torch.arange(num_steps, device=ends.device)  # [K], of the steps
    last_end = ends[(step_cu[i_seq + 1] - 1)]
    process = torch.cat([returns, returns.new_zeros(1)])[step_cu[:-1]].where(n > 0, 0.0)  # [S]
    sum_of_returns = sequence_sum(returns * (ends + 1 - begin), step_cu)
    asked = torch.zeros_like(process, dtype=torch.bool)
    outcome = torch.zeros_like(process)
    if outcome_rewards is not None:
        asked = torch.ones_like(asked) if has_answer is None else has_answer
        outcome = outcome_rewards.double().where(asked, 0.0)

    def leave_one_out(numerator: Tensor, denominator: Tensor, counts: Tensor, alone: float) -> Tensor:
        numerator, denominator = numerator.where(counts, 0.0), denominator.double().where(counts, 0.0)
        others = group_sum(denominator, group_ids) - denominator
        # A group id out of range makes `others` NaN.
        return ((group_sum(numerator, group_ids) - numerator) / others).where(others != 0, alone)

    one = torch.ones_like(process)
    of_step = torch.zeros_like(returns)
    if preset == "verl":
        score = process_coef * sum_of_returns + outcome_coef * outcome * length
        if penalty is not None:
            score = score - sequence_sum(penalty.double(), cu_seqlens)
        baseline = leave_one_out(score / max_gen_len, one, (length > 0) & score.isfinite(), 0.0)
        base = outcome_coef * outcome - baseline
    else:
        alone = 1.0 if preset == "openrlhf" else 0.0
        counts = asked & (length > 0) & outcome.isfinite()
        base = outcome_coef * (outcome - leave_one_out(outcome, one, counts, alone)).where(asked, 0.0)
        numerator, denominator = {
            "paper": (sum_of_returns / max_gen_len, one),
            "paper-step": (process / n, one),
            "openrlhf": (process, length),
        }[preset]
        baseline = leave_one_out(numerator, denominator, (n > 0) & process.isfinite(), 0.0)
        if preset == "paper":
            base = base - process_coef * baseline.where(n > 0, 0.0)
        else:
            repeats = remaining if preset == "paper-step" else last_end + 1 - begin - remaining
            of_step = baseline[i_seq] * repeats
    outside = (group_ids < 0) | (group_ids >= num_sequences)
    base = (base + (process - process)).masked_fill(outside, torch.nan)
    levels = process_coef * (returns - of_step) + base[i_seq]
    stats = returns.new_zeros(2, 3)
    if preset in WHITENING:
        rows = step_rows(levels, base, step_ends, cu_seqlens, penalty, None, "", num_tokens, mask_step_ends, True)
        counted = rows.new_ones(num_tokens, dtype=torch.bool)
        if preset == "openrlhf":
            counted = rows != 0
            in_order = base.isfinite()[sequence_ids(cu_seqlens, num_tokens)]
            stats[1, 0] = (~counted & in_order).sum()
        elif mask_step_ends:
            counted = counted.index_fill(0, ends, False)
        stats[0] = moments(rows, counted)[0]
    return levels, base, stats


@_process_advantages.register_fake
def _(returns, step_ends, cu_seqlens, group_ids, outcome_rewards, has_answer, penalty, num_tokens, *options):
    return torch.empty_like(returns), returns.new_empty(cu_seqlens.shape[0] - 1), returns.new_empty(2, 3)
