"""Advantages of whole answers against the other answers to the same prompt."""

import torch
from torch import Tensor

from .checks import FLOATS, INTS, Checker
from .constant_op import constant_op
from .dtypes import acc_dtype
from .segments import group_sum

KINDS = ("rloo", "grpo", "dr_grpo", "opo", "reinforce_pp_baseline", "pass_at_k", "remax")


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    kind: str = "rloo",
    lengths: Tensor | None = None,
    baseline: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """The advantage of every sequence over its group, [S] float32 (float64 for float64).

    `rewards`: [S] floating. `group_ids`: [S] int32 or int64 in [0, S), in any order, groups of any size. `lengths`: [S]
    int32 or int64, the tokens of each sequence, for kind "opo". `baseline`: [S] of rewards' dtype, the reward of the
    greedy answer to each sequence's prompt, for kind "remax". With n the size of a group and sums over it:

        rloo       R_i - mean of the other n - 1 rewards                            (arXiv 2402.14740)
        grpo       (R_i - mean) / (std + eps), std with n - 1 in the denominator    (arXiv 2402.03300)
        dr_grpo    R_i - mean                                                       (arXiv 2503.20783)
        opo        R_i - sum L_k R_k / sum L_k                                      (arXiv 2505.23585)
        reinforce_pp_baseline   R_i - mean, for the caller to `whiten` per token    (arXiv 2501.03262)
        pass_at_k  (R_max - R_second) / (std + eps) for the best, the first of equal ones; 0 for the others
                                                                                    (arXiv 2503.19595)
        remax      R_i - baseline_i                                                 (arXiv 2310.10505)

    A group of one gives A = R for rloo and grpo, as in verl, and 0 for the others with a group baseline; equal rewards
    give 0. A reward (or baseline) that is not finite makes its own A NaN and is left out of its group. Groups are those
    of this call: no rank sees another's. Not differentiable.

    Raises TypeError or ValueError for a wrong dtype, shape or device, an unknown kind, or lengths or baseline missing
    from their kind or given to another, and, on CPU, ValueError for a group id out of range (on CUDA its A is NaN) or a
    negative length.
    """
    check = Checker()
    check("rewards", rewards, "S", FLOATS)
    check("group_ids", group_ids, "S", INTS)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    for name, x, its_kind, dtypes in (
        ("lengths", lengths, "opo", INTS),
        ("baseline", baseline, "remax", (rewards.dtype,)),
    ):
        if (x is not None) != (kind == its_kind):
            given = "None" if x is None else "a tensor"
            raise ValueError(f"{name} must be given for kind {its_kind!r} only, got {given} for {kind!r}")
        if x is not None:
            check(name, x, "S", dtypes)
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    return _group_advantages(rewards, group_ids, lengths, baseline, kind, float(eps))


@constant_op("group_advantages")
def _group_advantages(
    rewards: Tensor, group_ids: Tensor, lengths: Tensor | None, baseline: Tensor | None, kind: str, eps: float
) -> Tensor:
    finite = rewards.isfinite()
    r = rewards.double().where(finite, 0.0)
    n = group_sum(finite.double(), group_ids)
    deviation = (r - group_sum(r, group_ids) / n).where(finite, 0.0)
    std = (group_sum(deviation.square(), group_ids) / (n - 1)).sqrt()
    if kind == "rloo":
        advantages = r.where(n == 1, deviation * n / (n - 1))
    elif kind == "grpo":
        advantages = r.where(n == 1, (deviation / (std + eps)).where(deviation != 0, 0.0))
    elif lengths is not None:  # opo
        weights = lengths.double().where(finite, 0.0)
        # About the mean, which is what remains where no sequence of the group has tokens.
        shift = group_sum(weights * deviation, group_ids) / group_sum(weights, group_ids).clamp(min=1)
        advantages = deviation - shift
    elif kind == "pass_at_k":
        lead = _lead_of_the_best(r.where(finite, -torch.inf), group_ids)
        advantages = (lead / (std + eps)).where((lead > 0) & (n > 1), 0.0)
    elif baseline is not None:  # remax
        advantages = r - baseline.double()
        finite = finite & baseline.isfinite()
    else:
        advantages = deviation
    return advantages.where(finite & n.isfinite(), torch.nan).to(acc_dtype(rewards.dtype))


def _lead_of_the_best(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """[S]: for the first of the highest rewards of each group its lead over the next one, 0 for the others."""
    order = rewards.argsort(stable=True, descending=True)
    order = order[group_ids[order].argsort(stable=True)]
    ids, sorted_rewards = group_ids[order], rewards[order]
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = ids[1:] != ids[:-1]
    lead = (sorted_rewards - sorted_rewards.roll(-1)).where(first, 0.0)
    return torch.empty_like(lead).scatter(0, order, lead)


@_group_advantages.register_fake
def _(rewards, group_ids, lengths, baseline, kind, eps):
    return torch.empty_like(rewards, dtype=acc_dtype(rewards.dtype))
