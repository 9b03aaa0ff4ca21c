"""Returns of process rewards: the min-form of PURE, its soft and causal relatives, sum and mean."""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import FLOATS, INTS, Checker
from .constant_op import constant_op
from .dtypes import acc_dtype
from .step_rows import step_rows

OPERATORS = ("soft", "hard", "revmin", "causal_soft", "sum", "mean")


class MinForm(NamedTuple):
    returns: Tensor  # [T] float32
    outcome: Tensor  # [S] float32
    worst_step: Tensor  # [S] int64, an index of step_rewards, or -1


def min_form_returns(
    step_rewards: Tensor,
    step_ends: Tensor,
    cu_seqlens: Tensor,
    *,
    operator: str = "soft",
    temperature: float = 0.1,
    num_tokens: int | None = None,
) -> MinForm:
    """The return of every row from the rewards of the steps, the same for all rows of a step.

    `step_rewards`: [K] floating. `step_ends`: [K] int32 or int64, the packed row that closes each step, strictly
    ascending. `cu_seqlens`: [S+1] int32 or int64. With r_1 to r_n the steps of a sequence, the return of step t is

        soft         sum over j >= t of w_j r_j        w = softmax(-r / temperature) over all n steps
        hard         r_w for t <= w, else 0            w the worst step; k tied ones hold r_w / k each
        revmin       min over j >= t of r_j
        causal_soft  sum over j >= t of w_j r_j        w = softmax(-r / temperature) over the steps j >= t
        sum, mean    sum over j >= t of r_j, of r_j / n

    PURE (arXiv 2504.15275) defines `hard` (eq. 3) and trains with `soft` (eq. 5 and 6, temperature 0.1). hard and mean
    are soft at temperature 0 and infinity, revmin is causal_soft at 0. A step owns the rows after the step before it up
    to its end; rows after the last end give 0.

    Returns [T] float32 (float64 for float64) `returns`; [S] `outcome`, the return of the first step, 0 without steps;
    [S] int64 `worst_step`, the first of the lowest steps as an index of step_rewards, -1 without steps. A step reward
    that is not finite makes the returns and the outcome of its sequence NaN and its worst_step -1. Computed in float64,
    rounded once. Not differentiable.

    `num_tokens` is T; None reads cu_seqlens[-1], which waits for the device on CUDA. Raises TypeError or ValueError for
    a wrong dtype, shape or device, an unknown operator or a negative temperature, and, on CPU, ValueError where
    cu_seqlens do not start at 0, decrease, or do not end at T, or step_ends do not ascend within [0, T).
    """
    check_steps(Checker(), step_rewards, step_ends, cu_seqlens)
    if num_tokens is None:
        num_tokens = int(cu_seqlens[-1])
    values, outcome, worst_step = _min_form_returns(
        step_rewards, step_ends, cu_seqlens, num_tokens, *form_of(operator, temperature)
    )
    wide = step_rewards.dtype == torch.float64
    returns = step_rows(values, None, step_ends, cu_seqlens, None, None, "", num_tokens, False, wide)
    return MinForm(returns, outcome, worst_step)


def check_steps(check: Checker, step_rewards: Tensor, step_ends: Tensor, cu_seqlens: Tensor) -> None:
    check("step_rewards", step_rewards, "K", FLOATS)
    check("step_ends", step_ends, "K", INTS)
    check("cu_seqlens", cu_seqlens, "S+1", INTS)


def form_of(operator: str, temperature: float) -> tuple[str, float]:
    """The form that the kernels know, and its temperature."""
    if operator not in OPERATORS:
        raise ValueError(f"operator must be one of {', '.join(OPERATORS)}, got {operator!r}")
    if not temperature >= 0:
        raise ValueError(f"temperature must be >= 0, got {temperature}")
    limits = {"hard": ("soft", 0.0), "mean": ("soft", math.inf), "revmin": ("causal_soft", 0.0)}
    return limits.get(operator, (operator, float(temperature)))


@constant_op("min_form_returns")
def _min_form_returns(
    step_rewards: Tensor, step_ends: Tensor, cu_seqlens: Tensor, num_tokens: int, form: str, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Per step [K] float64, per sequence the outcome and the worst step."""
    returns = step_rewards.to(torch.float64, copy=True)
    outcome = returns.new_zeros(cu_seqlens.shape[0] - 1, dtype=acc_dtype(step_rewards.dtype))
    worst_step = step_ends.new_full(outcome.shape, -1, dtype=torch.int64)
    bounds = torch.searchsorted(step_ends.to(torch.int64), cu_seqlens.to(torch.int64)).tolist()
    for i, (first, last) in enumerate(pairwise(bounds)):
        if first == last:
            continue
        r = returns[first:last].clone()
        if r.isfinite().all():
            worst_step[i] = first + r.argmin()
            for t in range(last - first):
                w = (
                    1.0
                    if form == "sum"
                    else _weights(r[t:] if form == "causal_soft" else r, temperature)[-len(r[t:]) :]
                )
                returns[first + t] = (w * r[t:]).sum()
        else:
            returns[first:last] = torch.nan
        outcome[i] = returns[first]
    return returns, outcome, worst_step


def _weights(rewards: Tensor, temperature: float) -> Tensor:
    """softmax(-rewards / temperature), also in its limits 0 and infinity."""
    excess = rewards - rewards.min()
    weights = (-excess / temperature if temperature else -excess * math.inf).exp().where(excess != 0, 1.0)
    return weights / weights.sum()


@_min_form_returns.register_fake
def _(step_rewards, step_ends, cu_seqlens, num_tokens, form, temperature):
    num_sequences = cu_seqlens.shape[0] - 1
    return (
        torch.empty_like(step_rewards, dtype=torch.float64),
        step_rewards.new_empty(num_sequences, dtype=acc_dtype(step_rewards.dtype)),
        step_rewards.new_empty(num_sequences, dtype=torch.int64),
    )
