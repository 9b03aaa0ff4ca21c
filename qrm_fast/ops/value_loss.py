"""Squared error of a critic over packed action rows, clipped on request, with its gradient in the same pass."""

import math

import torch
from torch import Tensor

from .checks import FLOATS, Checker
from .dtypes import acc_dtype
from .policy_loss import scaled_derivative


def value_loss(
    values: Tensor,
    returns: Tensor,
    *,
    old_values: Tensor | None = None,
    clip: float | None = None,
    token_weights: Tensor | None = None,
) -> Tensor:
    """Token-weighted squared error of `values`, 0-d float32 (float64 for float64), differentiable in `values`.

    `values`: [T] floating. `returns`, `token_weights`: [T] float32 (float64 beside float64). `old_values`: [T], dtype
    of `values`, with `clip` > 0; both or neither.

        loss = sum_t w_t l_t        l_t = (V_t - R_t)^2
        with clip:                  l_t = max((V_t - R_t)^2, (clip(V_t, old_t - clip, old_t + clip) - R_t)^2)

    There is no factor 1/2. The clipped form is that of PPO's first implementation (Engstrom et al., arXiv 2005.12729,
    section 3, item 1): where the clipped error is the larger and V_t was clipped, V_t gets no gradient.
    `token_weights` None: the mean over all T rows, 0 where T = 0. Weight 0 masks a row: whatever it holds, NaN
    included, reaches neither the loss nor a gradient. Sums are deterministic for any number of threads, and add up
    over micro-batches. All tensors but `values` are constants.

    Raises TypeError or ValueError for a wrong dtype, shape or device, clip without old_values or the reverse,
    clip <= 0, and a constant that requires grad.
    """
    check = Checker()
    check("values", values, "T", FLOATS)
    acc = acc_dtype(values.dtype)
    constants = {"returns": (returns, acc)}
    if old_values is not None:
        constants["old_values"] = old_values, values.dtype
    if token_weights is not None:
        constants["token_weights"] = token_weights, acc
    for name, (x, dtype) in constants.items():
        check(name, x, "T", (dtype,))
        if x.requires_grad:
            raise ValueError(f"{name} must not require grad, it is a constant of the loss: pass {name}.detach()")
    if (clip is None) != (old_values is None):
        got = "old_values without clip" if clip is None else f"clip {clip} without old_values"
        raise ValueError(f"clip and old_values go together, got {got}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be positive or None, got {clip}")
    loss, _ = _value_loss(values, returns, old_values, token_weights, math.inf if clip is None else float(clip))
    return loss


@torch.library.custom_op("qrm_fast::value_loss", mutates_args=())
def _value_loss(
    values: Tensor, returns: Tensor, old_values: Tensor | None, token_weights: Tensor | None, clip: float
) -> tuple[Tensor, Tensor]:
    """The loss and its derivative [T]."""
    v = values.to(returns.dtype)
    weight = torch.full_like(v, 1 / max(len(v), 1)) if token_weights is None else token_weights
    error = v - returns
    loss, derivative = error.square(), 2 * error
    if old_values is not None:
        old = old_values.to(v.dtype)
        clipped = (torch.clamp(v, old - clip, old + clip) - returns).square()
        loss, derivative = torch.maximum(loss, clipped), derivative.masked_fill(loss < clipped, 0)
    keep = weight != 0
    return (weight * loss).where(keep, 0).sum(), (weight * derivative).where(keep, 0)


@_value_loss.register_fake
def _(values, returns, old_values, token_weights, clip):
    return returns.new_empty(()), torch.empty_like(returns)


def _setup_context(ctx, inputs, output):
    values, *_ = inputs
    _, derivative = output
    ctx.mark_non_differentiable(derivative)
    ctx.save_for_backward(derivative, values)


def _backward(ctx, grad_loss, _grad_derivative):
    return scaled_derivative(grad_loss, *ctx.saved_tensors), *(None,) * 4


_value_loss.register_autograd(_backward, setup_context=_setup_context)
