"""Packed sequences and groups of sequences in plain PyTorch, for the references of the ops.

The sums are deterministic on every device and without a host synchronisation (`index_add` would use float atomics on
CUDA). What a reference that serves every device needs to know of its data is checked here too, where the data is at
hand.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor


def at_hand(x: Tensor) -> bool:
    """Whether reading `x` on the host waits for no device."""
    return not x.is_cuda


def check_boundaries(cu_seqlens: Tensor, num_rows: int, name: str = "cu_seqlens") -> None:
    """Raise ValueError unless the boundaries start at 0, never decrease and end at `num_rows`, if they are at hand."""
    if not at_hand(cu_seqlens):
        return
    first, last = cu_seqlens[0].item(), cu_seqlens[-1].item()
    if first != 0:
        raise ValueError(f"{name} must start at 0, got {first}")
    decreases = cu_seqlens[1:] < cu_seqlens[:-1]
    if decreases.any():
        i = int(decreases.int().argmax())
        before, after = cu_seqlens[i : i + 2].tolist()
        raise ValueError(f"{name} must not decrease, got {before} then {after} at index {i + 1}")
    if last != num_rows:
        raise ValueError(f"{name} must end at the number of packed rows, {num_rows}, got {last}")


def check_group_ids(group_ids: Tensor, inside: Tensor) -> None:
    """Raise ValueError unless all ids are `inside` [0, S), if they are at hand."""
    if at_hand(group_ids) and not inside.all():
        i = int(inside.int().argmin())
        raise ValueError(f"group_ids must lie in [0, {len(group_ids)}), got {group_ids[i].item()} at index {i}")


def ascending(cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """The boundaries as int64. What nobody could check is taken as if it ascended within [0, num_rows]."""
    return cu_seqlens.to(torch.int64).clamp(0, num_rows).cummax(0).values


def sequence_ids(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """[T] int64: the sequence that each packed row belongs to; S for rows behind the last boundary."""
    ends = ascending(cu_seqlens, num_tokens)[1:]
    lengths = ends.diff(prepend=ends.new_zeros(1), append=ends.new_full((1,), num_tokens))
    return torch.repeat_interleave(lengths, output_size=num_tokens)


def sequence_sum(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[S]: the sum of `x` [T] over each packed sequence."""
    return torch.segment_reduce(x, "sum", offsets=ascending(cu_seqlens, x.shape[0]), unsafe=True)


def group_sum(x: Tensor, group_ids: Tensor) -> Tensor:
    """[S]: for every sequence the sum of `x` [S] over its group; NaN where its group id is outside [0, S)."""
    num_sequences = x.shape[0]
    order = group_ids.argsort(stable=True)
    bounds = torch.searchsorted(group_ids[order], torch.arange(num_sequences + 1, device=x.device))
    of_groups = torch.segment_reduce(x[order], "sum", offsets=bounds, unsafe=True)
    inside = (group_ids >= 0) & (group_ids < num_sequences)
    return of_groups[group_ids.where(inside, 0)].where(inside, torch.nan)


def rows_from_the_end(cu_seqlens: Tensor, mask: Tensor | None) -> Iterator[tuple[int, list[int]]]:
    """Every sequence and its unmasked rows, last row first. Reads cu_seqlens and mask on the host."""
    for s, (bos, eos) in enumerate(pairwise(cu_seqlens.tolist())):
        yield s, [t for t in reversed(range(bos, eos)) if mask is None or mask[t]]
