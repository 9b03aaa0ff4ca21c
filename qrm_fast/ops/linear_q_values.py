"""Q of the taken action and what the policy expects of Q, from two vocabulary heads in one sweep of the vocabulary."""

from typing import NamedTuple

import torch
from torch import Tensor

from .autocast import as_for_linear
from .checks import FLOATS, INT64, Checker
from .constant_op import constant_op
from .dtypes import acc_dtype
from .linear_logprobs import check_logit_options


class QValues(NamedTuple):
    """[T] float32 each."""

    logprobs: Tensor
    entropy: Tensor  # nats
    q: Tensor  # of the target
    expected_q: Tensor  # under the policy
    soft_value: Tensor


def linear_q_values(
    policy_hidden: Tensor,
    policy_weight: Tensor,
    q_hidden: Tensor,
    q_weight: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    beta: float = 1.0,
    ignore_index: int = -100,
) -> QValues:
    """Policy and Q-function over one vocabulary, joined while the logits of both are at hand; no [T, V] tensor.

    `policy_hidden`: [T, Dp] floating, rows may be strided, as in every argument. `policy_weight`: [V, Dp]. `q_hidden`:
    [T, Dq]. `q_weight`: [V, Dq]. All have one dtype. `targets`: [T] int64 in [0, V), or `ignore_index`: that row is
    not read and gives 0 in every field. `temperature`: a positive number, or [T] float32 (float64 for float64), of the
    policy. Both hidden states are those before the action.

        z = policy_hidden @ policy_weight.T / temperature      p = softmax(z)      Q = q_hidden @ q_weight.T
        logprobs = log p_target         entropy = -sum_v p_v log p_v                q = Q_target
        expected_q = sum_v p_v Q_v      soft_value = beta log sum_v exp(Q_v / beta)

    q - expected_q is an action's advantage. With the logits of Q-RM for Q it is the advantage up to a positive factor,
    which normalising removes: they are a Q up to that factor and a function of the state (arXiv 2505.23363, Proposition
    3.4). soft_value is the value of the policy exp(Q / beta) (Haarnoja et al., arXiv 1702.08165, eq. 6).
    Products and sums are float32 for 16-bit inputs (float64 for float64), no logit is rounded to 16 bits, and all
    results are float32 (float64), as exact as `linear_logprobs` of the deeper head and the larger logits. A row's bits
    depend on that row and the weights alone. Not differentiable. Under autocast the tensors are cast as for F.linear.

    Raises TypeError or ValueError for a wrong dtype, shape, device or option, and, on CPU, ValueError for a target
    outside [0, V); on CUDA such a row is NaN.
    """
    tensors = as_for_linear(policy_hidden, policy_weight, q_hidden, q_weight)
    policy_hidden, policy_weight, q_hidden, q_weight = tensors
    check = Checker()
    check("policy_hidden", policy_hidden, "T Dp", FLOATS, strided=True)
    check("policy_weight", policy_weight, "V Dp", (policy_hidden.dtype,), strided=True)
    check("q_hidden", q_hidden, "T Dq", (policy_hidden.dtype,), strided=True)
    check("q_weight", q_weight, "V Dq", (policy_hidden.dtype,), strided=True)
    check("targets", targets, "T", INT64)
    if check.dims["V"] == 0:
        raise ValueError("policy_weight must have at least one row, got [0, Dp]")
    number, per_row = check_logit_options(check, policy_hidden.dtype, temperature, None)
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    return QValues(*_linear_q_values(*tensors, targets, number, per_row, float(beta), ignore_index))


@constant_op("linear_q_values")
def _linear_q_values(
    policy_hidden: Tensor,
    policy_weight: Tensor,
    q_hidden: Tensor,
    q_weight: Tensor,
    targets: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    beta: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    acc = acc_dtype(policy_hidden.dtype)
    z = policy_hidden.to(acc) @ policy_weight.to(acc).T
    logp = (z / (temperature if temperatures is None else temperatures[:, None])).log_softmax(-1)
    q = q_hidden.to(acc) @ q_weight.to(acc).T
    p = logp.exp()
    ignored = targets == ignore_index
    outside = ~ignored & ((targets < 0) | (targets >= len(q_weight)))
    taken = targets.masked_fill(ignored | outside, 0)[:, None]
    results = (
        logp.gather(-1, taken)[:, 0],
        -torch.where(p == 0, 0, p * logp).sum(-1),
        q.gather(-1, taken)[:, 0],
        torch.where(p == 0, 0, p * q).sum(-1),
        beta * (q / beta).logsumexp(-1),
    )
    logprobs, entropy, q_taken, expected_q, soft_value = (
        x.masked_fill(outside, torch.nan).masked_fill(ignored, 0) for x in results
    )
    return logprobs, entropy, q_taken, expected_q, soft_value


@_linear_q_values.register_fake
def _(policy_hidden, policy_weight, q_hidden, q_weight, targets, *_):
    acc = acc_dtype(policy_hidden.dtype)
    return tuple(torch.empty_like(targets, dtype=acc) for _ in range(5))
