"""What one shard of a vocabulary contributes to log-probability and entropy; `merge_logprobs` puts shards together."""

from typing import NamedTuple

import torch
from torch import Tensor

from .autocast import as_for_linear
from .checks import Checker
from .constant_op import constant_op
from .dtypes import acc_dtype
from .linear_logprobs import _logits, check_head


class LogprobsPartial(NamedTuple):
    """Softmax statistics of the columns of one shard; [T] float32 each, [R, T] for R shards in `merge_logprobs`."""

    max: Tensor  # max z, -inf without a column
    sumexp: Tensor  # sum e^(z - max)
    sum_z_exp: Tensor  # sum (z - max) e^(z - max)
    target_logit: Tensor  # z of the target, NaN where the target is no column of this shard


def linear_logprobs_partial(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_start: int,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> LogprobsPartial:
    """`linear_logprobs` of the part of the vocabulary that this process holds, in the form that parts are merged in.

    `hidden`: [T, D] floating, rows may be strided, the same on every shard. `weight`: [V, D], same dtype, rows
    [vocab_start, vocab_start + V) of the whole head. `targets`: [T] int64, ids of the whole vocabulary, or
    `ignore_index`. `bias`: [V], this shard's. `temperature`, `softcap`: as in `linear_logprobs`.

        z = softcap(hidden @ weight.T + bias) / temperature
        max_v z_v        sumexp = sum_v e^(z_v - max)        sum_z_exp = sum_v (z_v - max) e^(z_v - max)

    A target outside this shard leaves `target_logit` NaN and changes nothing else; an ignored row contributes
    nothing: (-inf, 0, 0, NaN). Gather the parts of all shards, e.g. `torch.stack(partial)` through
    `dist.all_gather_into_tensor` into [R, 4, T], and pass `LogprobsPartial(*gathered.unbind(1))` to `merge_logprobs`:
    16 bytes per row and shard travel (Megatron-LM, arXiv 1909.08053, section 3, for the entropy as well).
    For scoring: not differentiable. Dtypes, accuracy and bits are those of `linear_logprobs`.

    Raises TypeError or ValueError for a wrong dtype, shape, device or option. An id that no shard holds shows when
    the parts are merged.
    """
    hidden, weight, bias = as_for_linear(hidden, weight, bias)
    number, per_row = check_head(Checker(), hidden, weight, targets, bias, temperature, softcap)
    if vocab_start < 0:
        raise ValueError(f"vocab_start must be >= 0, got {vocab_start}")
    return LogprobsPartial(
        *_linear_logprobs_partial(hidden, weight, targets, vocab_start, bias, number, per_row, softcap, ignore_index)
    )


@constant_op("linear_logprobs_partial")
def _linear_logprobs_partial(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_start: int,
    bias: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z, _ = _logits(hidden, weight, bias, temperature, temperatures, softcap)
    top = z.amax(-1)
    shift = z - top.masked_fill(top == -torch.inf, 0)[:, None]
    e = shift.exp()
    weighted = (shift * e).masked_fill(e == 0, 0).sum(-1)
    ignored = targets == ignore_index
    local = targets - vocab_start
    here = ~ignored & (local >= 0) & (local < len(weight))
    target_logit = z.gather(-1, local.where(here, 0)[:, None])[:, 0]
    return (
        top.masked_fill(ignored, -torch.inf),
        e.sum(-1).masked_fill(ignored, 0),
        weighted.masked_fill(ignored, 0),
        target_logit.masked_fill(~here, torch.nan),
    )


@_linear_logprobs_partial.register_fake
def _(hidden, weight, targets, *_):
    acc = acc_dtype(hidden.dtype)
    return tuple(torch.empty_like(targets, dtype=acc) for _ in range(4))
