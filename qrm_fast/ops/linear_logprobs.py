"""Log-probability, entropy and log-partition of each token from hidden states, without [T, V] logits."""

from typing import NamedTuple

import torch
from torch import Tensor

from .autocast import as_for_linear
from .checks import FLOATS, INT64, Checker
from .dtypes import acc_dtype


class TokenLogprobs(NamedTuple):
    logprobs: Tensor  # [T] float32
    entropy: Tensor  # [T] float32, nats
    lse: Tensor  # [T] float32, not differentiable


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> TokenLogprobs:
    """`log_softmax(hidden @ weight.T)` at `targets`, with its entropy, in memory that does not grow with T * V.

    `hidden`: [T, D] floating, rows may be strided. `weight`: [V, D], same dtype. `targets`: [T] int64 in [0, V), or
    `ignore_index`: that row gives 0 in every field and carries no gradient. `bias`: [V], same dtype. `temperature`:
    a positive number, or [T] float32 (float64 for float64). `softcap`: a positive number c, logits become
    c tanh(logit / c).

        z = softcap(hidden @ weight.T + bias) / temperature      lse = log sum_v exp z_v
        logprobs = z_target - lse                                entropy = -sum_v p_v log p_v,  p = exp(z - lse)

    Products and sums are float32 for 16-bit inputs too (float64 for float64): no logit is ever rounded to 16 bits.
    Results are within 2e-5 of exact ones at |z| <= 30. Tensor cores, which multiply 16-bit inputs on CUDA, truncate
    their float32 sums instead of rounding them: D/16 2^-24 |z| comes on top there, |z| the largest
    |hidden @ weight.T| / temperature: 2.7e-4 for 20 at D = 3584 (docs/heads.md, "Accuracy").
    Differentiable in hidden, weight and bias through `logprobs` and `entropy` with any upstream gradient; the
    backward pass recomputes the logits block by block (4 GEMMs in all, fewer where an input is frozen):

        dL/dz_v = g_logp (1[v = target] - p_v) - g_entropy p_v (log p_v + entropy)

    Gradients leave in the inputs' dtype, rounded once; on CUDA dL/dz too is rounded to it, for 16-bit tensor cores take
    no other. A row whose two upstream gradients are 0 contributes nothing.
    A row's bits, in logprobs, entropy, lse and hidden's gradient, depend on that row, weight and bias alone.

    Raises TypeError or ValueError for a wrong dtype, shape, device or option, and, on CPU, ValueError for a target
    outside [0, V); on CUDA such a row is NaN.
    """
    hidden, weight, bias = as_for_linear(hidden, weight, bias)
    number, per_row = check_head(Checker(), hidden, weight, targets, bias, temperature, softcap)
    logprobs, entropy, lse, _ = _forward(hidden, weight, targets, bias, number, per_row, softcap, ignore_index)
    return TokenLogprobs(logprobs, entropy, lse)


def check_head(
    check: Checker,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
) -> tuple[float, Tensor | None]:
    """Raise for a bad head; returns the temperature as a number and, where it is a tensor, per row."""
    check("hidden", hidden, "T D", FLOATS, strided=True)
    check("weight", weight, "V D", (hidden.dtype,), strided=True)
    check("targets", targets, "T", INT64)
    if bias is not None:
        check("bias", bias, "V", (hidden.dtype,))
    if check.dims["V"] == 0:
        raise ValueError("weight must have at least one row, got [0, D]")
    return check_logit_options(check, hidden.dtype, temperature, softcap)


def check_logit_options(
    check: Checker, dtype: torch.dtype, temperature: float | Tensor, softcap: float | None
) -> tuple[float, Tensor | None]:
    """Raise for bad options of logits in `dtype`; the temperature as a number and, where it is a tensor, per row."""
    if isinstance(temperature, Tensor):
        check("temperature", temperature, "T", (acc_dtype(dtype),))
    elif not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    return (1.0, temperature) if isinstance(temperature, Tensor) else (float(temperature), None)


@torch.library.custom_op("qrm_fast::linear_logprobs", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy, lse, and what rounding took from lse, for the backward pass needs exp(z - lse) exactly."""
    z, _ = _logits(hidden, weight, bias, temperature, temperatures, softcap)
    return token_statistics(z, targets, ignore_index)


@_forward.register_fake
def _(hidden, weight, targets, bias, temperature, temperatures, softcap, ignore_index):
    acc = acc_dtype(hidden.dtype)
    return tuple(torch.empty_like(targets, dtype=acc) for _ in range(4))


@torch.library.custom_op("qrm_fast::linear_logprobs_backward", mutates_args=())
def _backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    entropy: Tensor,
    lse: Tensor,
    lse_residual: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight, bias; an empty [0] tensor where one is not needed."""
    z, slope = _logits(hidden, weight, bias, temperature, temperatures, softcap)
    dz, idle = logit_gradient(grad_logprobs, grad_entropy, z, slope, targets, ignore_index, entropy, lse, lse_residual)
    none = hidden.new_empty(0)
    active_hidden = hidden.to(dz.dtype).masked_fill(idle[:, None], 0)
    return (
        (dz @ weight.to(dz.dtype)).to(hidden.dtype) if need_hidden else none,
        (dz.T @ active_hidden).to(hidden.dtype) if need_weight else none.clone(),
        dz.sum(0).to(hidden.dtype) if need_bias else none.clone(),
    )


@_backward.register_fake
def _(
    grad_logprobs,
    grad_entropy,
    hidden,
    weight,
    targets,
    bias,
    temperature,
    temperatures,
    softcap,
    ignore_index,
    entropy,
    lse,
    lse_residual,
    need_hidden,
    need_weight,
    need_bias,
):
    none = hidden.new_empty(0)
    return (
        hidden.new_empty(hidden.shape) if need_hidden else none,
        weight.new_empty(weight.shape) if need_weight else none.clone(),
        weight.new_empty(weight.shape[0]) if need_bias else none.clone(),
    )


def _logits(hidden, weight, bias, temperature, temperatures, softcap) -> tuple[Tensor, Tensor]:
    """Logits [T, V] after bias, softcap and temperature, and their slope d z / d (hidden @ weight.T)."""
    acc = acc_dtype(hidden.dtype)
    z = hidden.to(acc) @ weight.to(acc).T
    if bias is not None:
        z = z + bias.to(acc)
    return finished_logits(z, temperature, temperatures, softcap)


def finished_logits(z, temperature, temperatures, softcap) -> tuple[Tensor, Tensor]:
    """Logits [T, V] after softcap and temperature, and the slope of that."""
    slope = torch.ones((), dtype=z.dtype, device=z.device)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
        slope = 1 - (z / softcap) ** 2
    t = temperature if temperatures is None else temperatures[:, None]
    return z / t, slope / t


def token_statistics(z: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy, lse and what rounding took from lse, of finished logits; NaN for a target outside [0, V)."""
    ignored = targets == ignore_index
    outside = ~ignored & ((targets < 0) | (targets >= z.shape[1]))
    logp = z.log_softmax(-1)
    top, place = z.max(-1)
    log_sum = -logp.gather(-1, place[:, None])[:, 0]
    lse = top + log_sum
    residual = (top - lse) + log_sum
    logprobs = logp.gather(-1, targets.masked_fill(ignored | outside, 0)[:, None])[:, 0]
    entropy = -torch.where(logp == -torch.inf, 0, logp.exp() * logp).sum(-1)
    logprobs, entropy, lse, residual = (
        x.masked_fill(outside, torch.nan).masked_fill(ignored, 0) for x in (logprobs, entropy, lse, residual)
    )
    return logprobs, entropy, lse, residual


def logit_gradient(
    grad_logprobs, grad_entropy, z, slope, targets, ignore_index, entropy, lse, lse_residual
) -> tuple[Tensor, Tensor]:
    """Gradient [T, V] of the logits before softcap and temperature, 0 in the rows without one, and which those are."""
    idle = (targets == ignore_index) | ((grad_logprobs == 0) & (grad_entropy == 0))
    logp = (z - lse[:, None]) - lse_residual[:, None]
    p = logp.exp()
    dz = -(grad_logprobs[:, None] + grad_entropy[:, None] * torch.where(p == 0, 0, logp + entropy[:, None])) * p
    here = targets.clamp(0, z.shape[1] - 1)[:, None]
    dz.scatter_add_(-1, here, grad_logprobs[:, None])
    return (dz * slope).masked_fill(idle[:, None], 0), idle


def _setup_context(ctx, inputs, output):
    hidden, weight, targets, bias, temperature, temperatures, softcap, ignore_index = inputs
    _, entropy, lse, lse_residual = output
    ctx.mark_non_differentiable(lse, lse_residual)
    ctx.save_for_backward(hidden, weight, targets, bias, temperatures, entropy, lse, lse_residual)
    ctx.options = temperature, softcap, ignore_index


def _autograd(ctx, grad_logprobs, grad_entropy, _grad_lse, _grad_residual):
    hidden, weight, targets, bias, temperatures, entropy, lse, lse_residual = ctx.saved_tensors
    temperature, softcap, ignore_index = ctx.options
    need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
    dh, dw, db = _backward(
        grad_logprobs.contiguous(),
        grad_entropy.contiguous(),
        hidden,
        weight,
        targets,
        bias,
        temperature,
        temperatures,
        softcap,
        ignore_index,
        entropy,
        lse,
        lse_residual,
        need_hidden,
        need_weight,
        need_bias,
    )
    return dh if need_hidden else None, dw if need_weight else None, None, db if need_bias else None, *(None,) * 4


_forward.register_autograd(_autograd, setup_context=_setup_context)
