"""Count, mean and spread of masked rows: the statistics behind whitening and reward normalisation."""

import torch
import torch.distributed as dist
from torch import Tensor

from .constant_op import constant_op
from .segments import group_sum, sequence_ids, sequence_sum


def moments(
    x: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    group_ids: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """[K, 3] float64: how many rows count, their mean, and the sum of their squared deviations from it.

    K is 1 without `cu_seqlens`: all of `x` [T], joined over the ranks of `process_group` if given. With `cu_seqlens`
    [S+1], K is S: each sequence, or with `group_ids` [S] the whole group that each sequence belongs to. A row counts
    where `mask` [T] is True and it is finite; a set without such rows has 0, 0, 0. A constant `x` has exactly zero
    spread (two passes). Not differentiable; the caller has checked the arguments.
    """
    local = _moments(x, mask, cu_seqlens, group_ids)
    return local if process_group is None else join_ranks(local, process_group)


def join_ranks(local: Tensor, process_group: dist.ProcessGroup) -> Tensor:
    """Moments [K, 3] of each set over all ranks, joined in the order of ranks: every rank holds the same bits."""
    ranks = local.new_empty(process_group.size(), *local.shape)
    dist.all_gather(list(ranks), local, group=process_group)
    count, mean, m2 = ranks.unbind(2)  # [ranks, K] each
    total = count.sum(0)
    origin = mean.gather(0, count.argmax(0, keepdim=True))
    joint = origin + (count * (mean - origin)).sum(0) / total.clamp(min=1)
    return torch.stack([total, joint[0], (m2 + count * (mean - joint).square()).sum(0)], dim=1)


@constant_op("moments")
def _moments(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, group_ids: Tensor | None) -> Tensor:
    if cu_seqlens is None:
        cu_seqlens = torch.arange(2, device=x.device) * x.shape[0]

    def over_set(y: Tensor) -> Tensor:
        sums = sequence_sum(y, cu_seqlens)
        return sums if group_ids is None else group_sum(sums, group_ids)

    counted = x.isfinite() if mask is None else x.isfinite() & mask
    values = x.double().where(counted, 0.0)
    count = over_set(counted.double())
    mean = over_set(values) / count.clamp(min=1)
    deviation = (values - mean[sequence_ids(cu_seqlens, x.shape[0])]).where(counted, 0.0)
    return torch.stack([count, mean, over_set(deviation.square())], dim=1)


@_moments.register_fake
def _(x, mask, cu_seqlens, group_ids):
    return x.new_empty((1 if cu_seqlens is None else cu_seqlens.shape[0] - 1, 3), dtype=torch.float64)
