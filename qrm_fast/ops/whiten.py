"""Whitening: rows brought to unit variance over everything a mask selects."""

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import BOOL, FLOATS, Checker
from .constant_op import constant_op
from .dtypes import acc_dtype
from .moments import moments


def whiten(
    x: Tensor,
    *,
    mask: Tensor | None = None,
    center: bool = True,
    unbiased: bool = False,
    eps: float = 1e-8,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`x` scaled to unit variance and, with `center`, shifted to mean 0: [T] float32 (float64 for float64).

    `x`: [T] floating. `mask`: [T] bool; rows where it is False count nowhere and give 0.

        y_t = (x_t - mean if center else x_t) / sqrt(var + eps)

    with the population variance, or n - 1 in its denominator if `unbiased` (masked_whiten of TRL and verl, which are
    unbiased, and which without centring put the mean back after scaling instead of scaling it too). Mean and variance
    are joined over the ranks of `process_group` if given. Zero variance, one row among them, gives 0. A row that is not
    finite is left out of mean and variance and stays not finite. Not differentiable.

    Raises TypeError or ValueError for a wrong dtype, shape or device.
    """
    check = Checker()
    check("x", x, "T", FLOATS)
    if mask is not None:
        check("mask", mask, "T", BOOL)
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    stats = moments(x, mask, process_group=process_group)
    return _whiten(x, stats, mask, bool(center), bool(unbiased), float(eps))


@constant_op("whiten", on_every_device=True)
def _whiten(x: Tensor, stats: Tensor, mask: Tensor | None, center: bool, unbiased: bool, eps: float) -> Tensor:
    count, mean, m2 = stats[0].unbind()
    variance = m2 / (count - int(unbiased)).clamp(min=1)
    scale = (variance + eps).sqrt().reciprocal().where(variance != 0, 0.0)
    y = x.to(torch.float64, copy=True)
    if center:
        y.sub_(mean)
    y = y.mul_(scale).to(acc_dtype(x.dtype))
    return y if mask is None else y.where(mask, 0.0)


@_whiten.register_fake
def _(x, stats, mask, center, unbiased, eps):
    return torch.empty_like(x, dtype=acc_dtype(x.dtype))
