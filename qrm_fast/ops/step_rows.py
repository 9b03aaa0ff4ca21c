"""Values of steps spread over the rows of their steps."""

import torch
from torch import Tensor

from .constant_op import constant_op
from .segments import sequence_ids


@constant_op("step_rows")
def step_rows(
    values: Tensor,
    base: Tensor | None,
    step_ends: Tensor,
    cu_seqlens: Tensor,
    penalty: Tensor | None,
    stats: Tensor | None,
    whitening: str,
    num_tokens: int,
    mask_step_ends: bool,
    wide: bool,
) -> Tensor:
    """[T] float32 (float64 if `wide`): for every row the value of its step, `values` [K] float64.

    Rows after their sequence's last step end hold `base` [S] float64; without it 0, or NaN where the sequence's steps
    are NaN. `penalty` [T], in the result's dtype, is subtracted. With `stats` [2, 3], moments, the rows x are whitened:

        unbiased  (x - mean) / sqrt(m2 / (count - 1) + 1e-8)
        nonzero   (x - mean) / sqrt(max((m2 + num_zeros mean^2) / count, 1e-8)); an x of exactly 0 stays

    where num_zeros is the count of the second set. `mask_step_ends` zeroes the rows of `step_ends`. Not differentiable;
    the caller has checked the arguments.
    """
    num_steps, num_sequences = step_ends.shape[0], cu_seqlens.shape[0] - 1
    ends, cu = step_ends.to(torch.int64), cu_seqlens.to(torch.int64)
    rows = torch.arange(num_tokens, device=values.device)
    if num_sequences == 0:
        return values.new_zeros(num_tokens, dtype=torch.float64 if wide else torch.float32)
    i_seq = sequence_ids(cu, num_tokens).clamp(max=num_sequences - 1)
    step_cu = torch.searchsorted(ends, cu)
    i_step = torch.searchsorted(ends, rows)  # the first step that ends at or after the row
    padded = torch.cat([values, values.new_zeros(1)])
    if base is None:
        first = padded[step_cu[:-1]].where(step_cu[:-1] < step_cu[1:], 0.0)
        base = first - first
    x = padded[i_step].where(i_step < step_cu[i_seq + 1], base[i_seq])
    if penalty is not None:
        x = x - penalty
    if stats is not None:
        shift, scale = shift_and_scale(stats, whitening)
        y = (x - shift) * scale
        x = y.where(x != 0, 0.0) if whitening == "nonzero" else y
    if mask_step_ends:
        at_end = (i_step < num_steps) & (torch.cat([ends, ends.new_zeros(1)])[i_step] == rows)
        x = x.where(~at_end, 0.0)
    return x.to(torch.float64 if wide else torch.float32)


def shift_and_scale(stats: Tensor, whitening: str) -> Tensor:
    """[2] float64: what whitening subtracts from every row, and what it multiplies with."""
    (count, mean, m2), (num_zeros, _, _) = stats
    if whitening == "nonzero":
        variance = ((m2 + num_zeros * mean.square()) / count.clamp(min=1)).clamp(min=1e-8)
    else:
        variance = m2 / (count - 1).clamp(min=1) + 1e-8
    return torch.stack([mean, variance.rsqrt()])


@step_rows.register_fake
def _(values, base, step_ends, cu_seqlens, penalty, stats, whitening, num_tokens, mask_step_ends, wide):
    return values.new_empty(num_tokens, dtype=torch.float64 if wide else torch.float32)
