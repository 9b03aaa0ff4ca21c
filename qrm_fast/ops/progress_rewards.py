"""Step rewards of a process advantage verifier: the progress a prover makes by a step."""

import torch
from torch import Tensor

from .checks import FLOATS, INTS, Checker
from .constant_op import constant_op
from .dtypes import acc_dtype
from .segments import ascending, check_boundaries


def progress_rewards(values_after: Tensor, start_values: Tensor, step_cu: Tensor, *, alpha: float = 1.0) -> Tensor:
    """The progress of every step, [K] float32 (float64 for float64).

    `values_after`: [K] floating, a prover's chance of success V_mu after each step. `start_values`: [S] of its dtype,
    the same before the first step of each sequence. `step_cu`: [S+1] int32 or int64, the steps of sequence i are
    step_cu[i] to step_cu[i+1] - 1.

        r_k = alpha (V_mu after step k - V_mu before it)

    (PAV, arXiv 2410.08146: added to the outcome reward; the prover mu is a policy other than the one in training). Over
    a sequence the rewards add up to alpha times the whole progress. Not differentiable.

    Raises TypeError or ValueError for a wrong dtype, shape or device, and, on CPU, ValueError where step_cu does not
    start at 0, decreases, or does not end at K.
    """
    check = Checker()
    check("values_after", values_after, "K", FLOATS)
    check("start_values", start_values, "S", (values_after.dtype,))
    check("step_cu", step_cu, "S+1", INTS)
    return _progress_rewards(values_after, start_values, step_cu, float(alpha))


@constant_op("progress_rewards", on_every_device=True)
def _progress_rewards(values_after: Tensor, start_values: Tensor, step_cu: Tensor, alpha: float) -> Tensor:
    num_steps = values_after.shape[0]
    check_boundaries(step_cu, num_steps, "step_cu")
    after = values_after.to(acc_dtype(values_after.dtype))
    before = torch.cat([after.new_zeros(1), after])
    cu = ascending(step_cu, num_steps)
    # No two sequences with steps start at one row; those without write behind the last, where nobody reads.
    first = cu[:-1].where(cu[:-1] < cu[1:], num_steps)
    before.scatter_(0, first, start_values.to(after.dtype))
    return (after - before[:-1]).mul_(alpha)


@_progress_rewards.register_fake
def _(values_after, start_values, step_cu, alpha):
    return torch.empty_like(values_after, dtype=acc_dtype(values_after.dtype))
