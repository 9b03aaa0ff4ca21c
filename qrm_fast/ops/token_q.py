"""Q-values of the taken actions from hidden states: a scalar head or one gathered row of a vocabulary head."""

import torch
from torch import Tensor

from .autocast import as_for_linear
from .checks import FLOATS, INT64, Checker
from .dtypes import acc_dtype

IGNORE_INDEX = -100


def token_q(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> Tensor:
    """Q-value of every action, [T] float32 (float64 for float64), without logits or normalised states in memory.

    `hidden`: [T, D] floating, rows may be strided. All other tensors but `targets` have its dtype.
    Scalar head: `head` [D] or [1, D], `bias` [1], no `targets`; hidden is the state that has consumed the action.
    Gathered head: `head` [V, D], rows may be strided, `targets` [T] int64 in [0, V), `bias` [V]; hidden is the state
    before the action. A row of target -100 gives 0 and carries no gradient.
    `norm_weight` [D]: hidden is the input of the model's final RMSNorm, applied here with epsilon `norm_eps`.

        q_t = x_t . head[a_t] + bias[a_t]        x_t = h_t, or norm_weight * h_t / sqrt(mean(h_t^2) + norm_eps)

    The scalar head is Q-RM (arXiv 2505.23363). Products, norm and sums are float32 for 16-bit inputs, where the
    modules of transformers round the normalised state to 16 bits before the head.
    Differentiable in hidden, head, bias and norm_weight, each formed only where it is needed; gradients leave in the
    inputs' dtype, rounded once. A row whose upstream gradient is 0 contributes nothing, whatever it holds.
    A row's bits, in q and in hidden's gradient, depend on that row and the weights alone; head's gradient sums rows
    in a fixed order. Under autocast the tensors are cast as for F.linear.

    Raises TypeError or ValueError for a wrong dtype, shape or device, and, on CPU, ValueError for a target outside
    [0, V); on CUDA such a row is NaN.
    """
    hidden, head, bias, norm_weight = as_for_linear(hidden, head, bias, norm_weight)
    check = Checker()
    check("hidden", hidden, "T D", FLOATS, strided=True)
    if isinstance(head, Tensor) and head.ndim == 1:
        check("head", head, "D", (hidden.dtype,))
        head = head[None]
    check("head", head, "V D", (hidden.dtype,), strided=True)
    if targets is not None:
        check("targets", targets, "T", INT64)
    elif check.dims["V"] != 1:
        raise ValueError(f"head must be [D] or [1, D] without targets, got {list(head.shape)}")
    if check.dims["V"] == 0:
        raise ValueError("head must have at least one row, got [0, D]")
    if bias is not None:
        check("bias", bias, "V", (hidden.dtype,))
    if norm_weight is not None:
        check("norm_weight", norm_weight, "D", (hidden.dtype,))
    return _token_q(hidden, head, targets, bias, norm_weight, float(norm_eps))


@torch.library.custom_op("qrm_fast::token_q", mutates_args=())
def _token_q(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
) -> Tensor:
    x, _ = _normed(hidden, norm_weight, norm_eps)
    ids, ignored, outside = _ids(hidden, head, targets)
    q = (x * head.to(x.dtype)[ids]).sum(-1)
    if bias is not None:
        q = q + bias.to(x.dtype)[ids]
    return q.masked_fill(outside, torch.nan).masked_fill(ignored, 0)


@_token_q.register_fake
def _(hidden, head, targets, bias, norm_weight, norm_eps):
    return hidden.new_empty(hidden.shape[0], dtype=acc_dtype(hidden.dtype))


@torch.library.custom_op("qrm_fast::token_q_backward", mutates_args=())
def _token_q_backward(
    grad_q: Tensor,
    hidden: Tensor,
    head: Tensor,
    targets: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    need_hidden: bool,
    need_head: bool,
    need_bias: bool,
    need_norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, head, bias, norm_weight; an empty [0] tensor where one is not needed."""
    x, rstd = _normed(hidden, norm_weight, norm_eps)
    ids, ignored, outside = _ids(hidden, head, targets)
    idle = (ignored | (grad_q == 0))[:, None]
    g = grad_q[:, None]
    dx = g * head.to(x.dtype)[ids]
    dhidden = dx
    if norm_weight is not None:
        xhat, dxhat = hidden.to(x.dtype) * rstd, dx * norm_weight.to(x.dtype)
        dhidden = rstd * (dxhat - xhat * (dxhat * xhat).mean(-1, keepdim=True))
        dnorm = (dx * xhat).masked_fill(idle | outside[:, None], 0).sum(0)
    rows = ~(idle[:, 0] | outside)
    dhead = x.new_zeros(head.shape).index_add_(0, ids[rows], (g * x)[rows])
    dbias = x.new_zeros(head.shape[0]).index_add_(0, ids[rows], grad_q[rows])
    dhidden = dhidden.masked_fill(outside[:, None], torch.nan).masked_fill(idle, 0)
    return (
        dhidden.to(hidden.dtype) if need_hidden else hidden.new_empty(0),
        dhead.to(hidden.dtype) if need_head else hidden.new_empty(0),
        dbias.to(hidden.dtype) if need_bias else hidden.new_empty(0),
        dnorm.to(hidden.dtype) if need_norm else hidden.new_empty(0),
    )


@_token_q_backward.register_fake
def _(grad_q, hidden, head, targets, norm_weight, norm_eps, need_hidden, need_head, need_bias, need_norm):
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        hidden.new_empty(head.shape if need_head else 0),
        hidden.new_empty(head.shape[0] if need_bias else 0),
        hidden.new_empty(hidden.shape[1] if need_norm else 0),
    )


def _normed(hidden: Tensor, norm_weight: Tensor | None, norm_eps: float) -> tuple[Tensor, Tensor]:
    """The states [T, D] that the head sees, and the norm's factor 1 / rms [T, 1]."""
    h = hidden.to(acc_dtype(hidden.dtype))
    rstd = torch.rsqrt(h.square().mean(-1, keepdim=True) + norm_eps)
    return (h, torch.ones_like(rstd)) if norm_weight is None else (h * rstd * norm_weight.to(h.dtype), rstd)


def _ids(hidden: Tensor, head: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """[T] each: the head's row of every action, made safe to read; ignored; outside the head."""
    if targets is None:
        targets = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    ignored = targets == IGNORE_INDEX
    outside = ~ignored & ((targets < 0) | (targets >= head.shape[0]))
    return targets.masked_fill(ignored | outside, 0), ignored, outside


def _setup_context(ctx, inputs, output):
    hidden, head, targets, _, norm_weight, ctx.norm_eps = inputs
    ctx.save_for_backward(hidden, head, targets, norm_weight)


def _backward(ctx, grad_q):
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3, 4)]
    grads = _token_q_backward(grad_q.contiguous(), *ctx.saved_tensors, ctx.norm_eps, *needs)
    dhidden, dhead, dbias, dnorm = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return dhidden, dhead, None, dbias, dnorm, None


_token_q.register_autograd(_backward, setup_context=_setup_context)
