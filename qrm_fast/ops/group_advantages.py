"""Advantages of whole answers against the other answers to the same prompt."""

import torch
from torch import Tensor

from ..checks import FLOATS, INTS, Checker
from ..segments import group_sum

KINDS = ("rloo", "grpo")


def group_advantages(rewards: Tensor, group_ids: Tensor, *, kind: str = "rloo", eps: float = 1e-6) -> Tensor:
    """The advantage of every sequence over its group, [S] float32 (float64 for float64).

    `rewards`: [S] floating. `group_ids`: [S] int32 or int64 in [0, S), in any order, groups of any size. With n the
    size of a group:

        rloo   A_i = R_i - mean of the other n - 1 rewards         (arXiv 2402.14740)
        grpo   A_i = (R_i - mean of the n) / (std + eps), std with n - 1 in the denominator   (arXiv 2402.03300)

    A group of one gives A = R in both, as in verl. A reward that is not finite makes its own A NaN and is left out of
    its group. Not differentiable.

    Raises TypeError or ValueError for a wrong dtype, shape or device or an unknown kind, and, on CPU, ValueError for a
    group id out of range (on CUDA its A is NaN).
    """
    check = Checker()
    check("rewards", rewards, "S", FLOATS)
    check("group_ids", group_ids, "S", INTS)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    return _group_advantages(rewards, group_ids, kind, float(eps))


@torch.library.custom_op("qrm_fast::group_advantages", mutates_args=())
def _group_advantages(rewards: Tensor, group_ids: Tensor, kind: str, eps: float) -> Tensor:
    finite = rewards.isfinite()
    r = rewards.double().where(finite, 0.0)
    n = group_sum(finite.double(), group_ids)
    deviation = (r - group_sum(r, group_ids) / n).where(finite, 0.0)
    if kind == "rloo":
        advantages = deviation * n / (n - 1)
    else:
        std = (group_sum(deviation.square(), group_ids) / (n - 1)).sqrt()
        advantages = (deviation / (std + eps)).where(deviation != 0, 0.0)
    advantages = r.where(n == 1, advantages).where(finite & n.isfinite(), torch.nan)
    return advantages.to(torch.promote_types(rewards.dtype, torch.float32))


@_group_advantages.register_fake
def _(rewards, group_ids, kind, eps):
    return torch.empty_like(rewards, dtype=torch.promote_types(rewards.dtype, torch.float32))
