"""Which answers are worth training on: those whose group has more than one reward."""

import torch
from torch import Tensor

from .checks import FLOATS, INTS, Checker
from .constant_op import constant_op
from .dtypes import acc_dtype
from .segments import check_group_ids


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


@constant_op("informative_groups", on_every_device=True)
def _informative_groups(rewards: Tensor, group_ids: Tensor) -> Tensor:
    num_sequences = rewards.shape[0]
    inside = (group_ids >= 0) & (group_ids < num_sequences)
    check_group_ids(group_ids, inside)
    ids = group_ids.to(torch.int64).where(inside, 0)
    counts = rewards.isfinite() & inside
    # The least and the greatest are the same in whatever order they are found.
    r = rewards.to(acc_dtype(rewards.dtype))
    lowest = torch.full_like(r, torch.inf).scatter_reduce_(0, ids, r.where(counts, torch.inf), "amin")
    highest = torch.full_like(r, -torch.inf).scatter_reduce_(0, ids, r.where(counts, -torch.inf), "amax")
    return (lowest < highest)[ids] & counts


@_informative_groups.register_fake
def _(rewards, group_ids):
    return torch.empty_like(rewards, dtype=torch.bool)
