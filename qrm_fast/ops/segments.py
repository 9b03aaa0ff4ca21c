"""Packed sequences and groups of sequences in plain PyTorch, for the references of the ops.

The sums are deterministic on every device and without a host synchronisation (`index_add` would use float atomics on
CUDA).
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor


def sequence_ids(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """[T] int64: the sequence that each packed row belongs to."""
    return torch.searchsorted(cu_seqlens[1:], torch.arange(num_tokens, device=cu_seqlens.device), right=True)


def sequence_sum(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[S]: the sum of `x` [T] over each packed sequence.

    On CUDA nobody has checked the boundaries: they are taken as if they ascended within [0, T].
    """
    offsets = cu_seqlens.clamp(0, x.shape[0]).cummax(0).values
    return torch.segment_reduce(x, "sum", offsets=offsets, unsafe=True)


def group_sum(x: Tensor, group_ids: Tensor) -> Tensor:
    """[S]: for every sequence the sum of `x` [S] over its group; NaN where its group id is outside [0, S)."""
    return _over_groups(x, group_ids, "sum")


def group_max(x: Tensor, group_ids: Tensor) -> Tensor:
    """[S]: for every sequence the maximum of `x` [S] over its group; NaN where its group id is outside [0, S)."""
    return _over_groups(x, group_ids, "max")


def _over_groups(x: Tensor, group_ids: Tensor, reduce: str) -> Tensor:
    num_sequences = x.shape[0]
    order = group_ids.argsort(stable=True)
    bounds = torch.searchsorted(group_ids[order], torch.arange(num_sequences + 1, device=x.device))
    of_groups = torch.segment_reduce(x[order], reduce, offsets=bounds, unsafe=True)
    inside = (group_ids >= 0) & (group_ids < num_sequences)
    return of_groups[group_ids.where(inside, 0)].where(inside, torch.nan)


def rows_from_the_end(cu_seqlens: Tensor, mask: Tensor | None) -> Iterator[tuple[int, list[int]]]:
    """Every sequence and its unmasked rows, last row first. Reads cu_seqlens and mask on the host."""
    for s, (bos, eos) in enumerate(pairwise(cu_seqlens.tolist())):
        yield s, [t for t in reversed(range(bos, eos)) if mask is None or mask[t]]
