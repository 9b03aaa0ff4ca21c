"""Token rewards that a policy trained on outcomes implies: its log-ratio to a reference."""

import torch
from torch import Tensor

from .checks import FLOATS, Checker
from .constant_op import constant_op
from .dtypes import acc_dtype


def implicit_rewards(logprobs: Tensor, ref_logprobs: Tensor, *, beta: float = 0.05) -> Tensor:
    """The implicit process reward of every token, [T] float32 (float64 for float64).

    `logprobs`, `ref_logprobs`: [T] floating, of one dtype: log-probabilities of the actions under the implicit reward
    model and under its reference.

        r_t = beta (logprobs_t - ref_logprobs_t)

    (Free Process Rewards without Process Labels, arXiv 2412.01981; PRIME, arXiv 2502.01456, uses beta 0.05). Not
    differentiable: to train the reward model, write the line above. Raises TypeError or ValueError for a wrong dtype,
    shape or device.
    """
    check = Checker()
    check("logprobs", logprobs, "T", FLOATS)
    check("ref_logprobs", ref_logprobs, "T", (logprobs.dtype,))
    return _implicit_rewards(logprobs, ref_logprobs, float(beta))


@constant_op("implicit_rewards", on_every_device=True)
def _implicit_rewards(logprobs: Tensor, ref_logprobs: Tensor, beta: float) -> Tensor:
    acc = acc_dtype(logprobs.dtype)
    return (logprobs.to(acc) - ref_logprobs.to(acc)).mul_(beta)


@_implicit_rewards.register_fake
def _(logprobs, ref_logprobs, beta):
    return torch.empty_like(logprobs, dtype=acc_dtype(logprobs.dtype))
