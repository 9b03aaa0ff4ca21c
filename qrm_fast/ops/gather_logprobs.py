"""Log-probability, entropy and log-partition of each token from logits that a trainer already holds, in one read."""

import torch
from torch import Tensor

from .checks import FLOATS, INT64, Checker
from .dtypes import acc_dtype
from .linear_logprobs import TokenLogprobs, check_logit_options, finished_logits, logit_gradient, token_statistics


def gather_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> TokenLogprobs:
    """`log_softmax(logits)` at `targets`, with its entropy, in one read of the logits and [T] memory.

    `logits`: [T, V] floating, rows may be strided. `targets`: [T] int64 in [0, V), or `ignore_index`: that row is not
    read, gives 0 in every field and carries no gradient. `temperature`: a positive number, or [T] float32 (float64 for
    float64). `softcap`: a positive number c, logits become c tanh(logit / c).

        z = softcap(logits) / temperature      lse = log sum_v exp z_v
        logprobs = z_target - lse              entropy = -sum_v p_v log p_v,  p = exp(z - lse)

    Statistics and results are float32 for 16-bit logits too (float64 for float64); what was rounded to 16 bits before
    stays rounded: `linear_logprobs` forms the logits itself and rounds none. The sums run online (Milakov and
    Gimelshein, arXiv 1805.02867, algorithm 3). Differentiable in logits through `logprobs` and `entropy` with any
    upstream gradient, formed in one more read:

        dL/dz_v = g_logp (1[v = target] - p_v) - g_entropy p_v (log p_v + entropy)

    The gradient leaves in the logits' dtype, rounded once. A row whose two upstream gradients are 0 is not read again
    and gets 0. `lse` is not differentiable. A row's bits depend on that row alone.

    Raises TypeError or ValueError for a wrong dtype, shape, device or option, and, on CPU, ValueError for a target
    outside [0, V); on CUDA such a row is NaN.
    """
    check = Checker()
    check("logits", logits, "T V", FLOATS, strided=True)
    check("targets", targets, "T", INT64)
    if check.dims["V"] == 0:
        raise ValueError("logits must have at least one column, got [T, 0]")
    number, per_row = check_logit_options(check, logits.dtype, temperature, softcap)
    logprobs, entropy, lse, _ = _gather_logprobs(logits, targets, number, per_row, softcap, ignore_index)
    return TokenLogprobs(logprobs, entropy, lse)


@torch.library.custom_op("qrm_fast::gather_logprobs", mutates_args=())
def _gather_logprobs(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy, lse, and what rounding took from lse, for the backward pass needs exp(z - lse) exactly."""
    z, _ = _finished(logits, temperature, temperatures, softcap)
    return token_statistics(z, targets, ignore_index)


@_gather_logprobs.register_fake
def _(logits, targets, temperature, temperatures, softcap, ignore_index):
    acc = acc_dtype(logits.dtype)
    return tuple(torch.empty_like(targets, dtype=acc) for _ in range(4))


@torch.library.custom_op("qrm_fast::gather_logprobs_backward", mutates_args=())
def _gather_logprobs_backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    entropy: Tensor,
    lse: Tensor,
    lse_residual: Tensor,
) -> Tensor:
    z, slope = _finished(logits, temperature, temperatures, softcap)
    dz, _ = logit_gradient(grad_logprobs, grad_entropy, z, slope, targets, ignore_index, entropy, lse, lse_residual)
    return dz.to(logits.dtype)


@_gather_logprobs_backward.register_fake
def _(grad_logprobs, grad_entropy, logits, *_):
    return logits.new_empty(logits.shape)


def _finished(logits, temperature, temperatures, softcap) -> tuple[Tensor, Tensor]:
    z = logits.to(acc_dtype(logits.dtype))
    return finished_logits(z, temperature, temperatures, softcap)


def _setup_context(ctx, inputs, output):
    logits, targets, temperature, temperatures, softcap, ignore_index = inputs
    _, entropy, lse, lse_residual = output
    ctx.mark_non_differentiable(lse, lse_residual)
    ctx.save_for_backward(logits, targets, temperatures, entropy, lse, lse_residual)
    ctx.options = temperature, softcap, ignore_index


def _backward(ctx, grad_logprobs, grad_entropy, _grad_lse, _grad_residual):
    logits, targets, temperatures, *statistics = ctx.saved_tensors
    temperature, softcap, ignore_index = ctx.options
    options = targets, temperature, temperatures, softcap, ignore_index
    upstream = grad_logprobs.contiguous(), grad_entropy.contiguous()
    return _gather_logprobs_backward(*upstream, logits, *options, *statistics), *(None,) * 5


_gather_logprobs.register_autograd(_backward, setup_context=_setup_context)
