"""Shaping of process rewards so that their sum cannot grow with the number of steps: Clip and Delta."""

import torch
from torch import Tensor

from .checks import FLOATS, INTS, Checker
from .constant_op import constant_op
from .dtypes import acc_dtype
from .segments import ascending, check_boundaries


def clip_delta(
    step_rewards: Tensor, step_cu: Tensor, *, eta: float = 0.0, clip: bool = True, delta: bool = True
) -> Tensor:
    """Shaped step rewards, [K] float32 (float64 for float64).

    `step_rewards`: [K] floating. `step_cu`: [S+1] int32 or int64, the steps of sequence i are step_cu[i] to
    step_cu[i+1] - 1. With r_1 to r_n the steps of a sequence, first Clip, then Delta:

        clip   r_k = min(r_k - eta, 0)
        delta  r_k = r_k - r_{k+1} for k < n - 1        r_{n-1} = r_{n-1}        r_n = 0

    (arXiv 2410.15115): Clip leaves nothing to gain from more steps, Delta bounds the return from any step by a single
    score. A NaN stays one, with Delta also in the step before it. Not differentiable.

    Raises TypeError or ValueError for a wrong dtype, shape or device, and, on CPU, ValueError where step_cu does not
    start at 0, decreases, or does not end at K.
    """
    check = Checker()
    check("step_rewards", step_rewards, "K", FLOATS)
    check("step_cu", step_cu, "S+1", INTS)
    return _clip_delta(step_rewards, step_cu, float(eta), bool(clip), bool(delta))


@constant_op("clip_delta", on_every_device=True)
def _clip_delta(step_rewards: Tensor, step_cu: Tensor, eta: float, clip: bool, delta: bool) -> Tensor:
    num_steps = step_rewards.shape[0]
    check_boundaries(step_cu, num_steps, "step_cu")
    r = step_rewards.to(acc_dtype(step_rewards.dtype), copy=True)
    if clip:
        r.sub_(eta).clamp_(max=0)
    if delta:
        ends = torch.zeros(num_steps + 1, dtype=torch.bool, device=r.device)
        last = ends.index_fill_(0, ascending(step_cu, num_steps), True)[1:]  # [K]
        # The last score is subtracted from nothing, so none crosses to the sequence before either.
        r = (r - r.masked_fill(last, 0.0).roll(-1)).masked_fill_(last, 0.0)
    return r


@_clip_delta.register_fake
def _(step_rewards, step_cu, eta, clip, delta):
    return torch.empty_like(step_rewards, dtype=acc_dtype(step_rewards.dtype))
