"""Which answers are worth training on: those whose group has more than one reward."""

import torch
from torch import Tensor

from .checks import FLOATS, INTS, Checker
from .constant_op import constant_op
from .segments import group_max


def informative_groups(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """[S] bool: True where the rewards of the sequence's group differ, so that a group baseline leaves an advantage.

    `rewards`: [S] floating. `group_ids`: [S] int32 or int64 in [0, S), in any order, groups of any size. This is the
    filter of dynamic sampling (DAPO, arXiv 2503.14476): groups where all answers are right, or all wrong, teach nothing
    to rloo and grpo. A reward that is not finite is left out of its group and is False itself; a group of one is False.
    Not differentiable.

    Raises TypeError or ValueError for a wrong dtype, shape or device, and, on CPU, ValueError for a group id out of
    range (on CUDA it is False).
    """
    check = Checker()
    check("rewards", rewards, "S", FLOATS)
    check("group_ids", group_ids, "S", INTS)
    return _informative_groups(rewards, group_ids)


@constant_op("informative_groups")
def _informative_groups(rewards: Tensor, group_ids: Tensor) -> Tensor:
    finite = rewards.isfinite()
    highest = group_max(rewards.double().where(finite, -torch.inf), group_ids)
    lowest = -group_max((-rewards.double()).where(finite, -torch.inf), group_ids)
    return (lowest < highest) & finite


@_informative_groups.register_fake
def _(rewards, group_ids):
    return torch.empty_like(rewards, dtype=torch.bool)
