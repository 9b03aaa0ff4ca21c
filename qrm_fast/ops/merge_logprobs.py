"""Log-probability and entropy of each token from what the shards of a vocabulary contribute."""

import torch
from torch import Tensor

from .checks import Checker
from .constant_op import constant_op
from .linear_logprobs import TokenLogprobs
from .linear_logprobs_partial import LogprobsPartial
from .segments import at_hand


def merge_logprobs(partials: LogprobsPartial) -> TokenLogprobs:
    """The whole vocabulary's `linear_logprobs` from the parts that `linear_logprobs_partial` computed on R shards.

    `partials`: each field [R, T] float32 (float64), rows may be strided: `LogprobsPartial(*gathered.unbind(1))` of a
    gathered [R, 4, T], or the parts of a list stacked field by field. The shards cover the vocabulary once; their
    order does not matter beyond rounding.

        M = max_r max_r      d_r = max_r - M
        S = sum_r e^d_r sumexp_r                     W = sum_r e^d_r (sum_z_exp_r + d_r sumexp_r)
        lse = M + log S      logprobs = target_logit - lse      entropy = log S - W / S

    (the merge of Milakov and Gimelshein, arXiv 1805.02867, section 3.1, with one more sum). All results are [T]
    float32 (float64 for float64), 0 in rows to which no shard contributes. Not differentiable.

    Raises TypeError or ValueError for a wrong dtype, shape or device, and, on CPU, ValueError for a row whose target
    no shard or more than one shard holds; on CUDA such a row is NaN.
    """
    check = Checker()
    check("partials.max", partials.max, "R T", (torch.float32, torch.float64), strided=True)
    for name in LogprobsPartial._fields[1:]:
        check(f"partials.{name}", getattr(partials, name), "R T", (partials.max.dtype,), strided=True)
    if check.dims["R"] == 0:
        raise ValueError("partials must hold at least one shard, got [0, T]")
    return TokenLogprobs(*_merge_logprobs(*partials))


@constant_op("merge_logprobs", on_every_device=True)
def _merge_logprobs(
    max: Tensor, sumexp: Tensor, sum_z_exp: Tensor, target_logit: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    top = max.amax(0)
    total, weighted, target = (torch.zeros_like(top) for _ in range(3))
    holders = torch.zeros_like(top, dtype=torch.int32)
    # Shard by shard: a sum over the first dimension would be taken in another order for one row than for many.
    for m, s, w, logit in zip(max, sumexp, sum_z_exp, target_logit, strict=True):
        shift = (m - top).masked_fill_(s == 0, 0)
        scale = shift.exp()
        total.add_(scale * s)
        weighted.add_(shift.mul_(s).add_(w).mul_(scale))
        held = logit.isnan().logical_not_()
        target.add_(logit.where(held, 0))
        holders.add_(held)
    log_sum = total.log()
    results = (target - top).sub_(log_sum).clamp_(max=0), (log_sum - weighted / total).clamp_(min=0), top + log_sum
    nothing = (total == 0) & (holders == 0)
    wrong = (holders != 1) & nothing.logical_not()
    _check_holders(holders, wrong & total.isnan().logical_not_(), max.shape[0])
    logprobs, entropy, lse = (x.masked_fill_(wrong, torch.nan).masked_fill_(nothing, 0) for x in results)
    return logprobs, entropy, lse


def _check_holders(holders: Tensor, wrong: Tensor, num_shards: int) -> None:
    """Raise ValueError unless one shard holds the target of every row, if that is at hand."""
    if at_hand(wrong) and wrong.any():
        row = int(wrong.int().argmax())
        raise ValueError(
            f"the target of every row must lie in one shard, got {holders[row].item()} of {num_shards} shards that "
            f"hold the target of row {row}"
        )


@_merge_logprobs.register_fake
def _(max, *_):
    logprobs, entropy, lse = (max.new_empty(max.shape[1]) for _ in range(3))
    return logprobs, entropy, lse
