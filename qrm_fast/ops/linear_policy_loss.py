"""The policy-gradient loss straight from hidden states, its gradients formed while the logits are at hand."""

import math

import torch
from torch import Tensor

from .autocast import as_for_linear
from .checks import Checker
from .dtypes import acc_dtype
from .linear_logprobs import _backward as linear_logprobs_backward
from .linear_logprobs import _forward as linear_logprobs_forward
from .linear_logprobs import check_head
from .policy_loss import PolicyLoss, PolicyMetrics, check_options, check_sequences, default_clip_low, scaled_derivative
from .policy_loss import _policy_loss as policy_loss_forward


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    token_weights: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    kind: str = "ppo",
    clip_low: float | None = None,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
) -> PolicyLoss:
    """`policy_loss(linear_logprobs(hidden, weight, targets))` in three GEMMs: no [T, V] logits, none computed twice.

    `hidden`: [T, D] floating, rows may be strided. `weight`: [V, D], `bias`: [V], same dtype. `targets`: [T] int64 in
    [0, V) or `ignore_index`. `advantages`, `old_logprobs`, `ref_logprobs`, `token_weights`: [T] float32 (float64 for
    float64). `cu_seqlens`: [S+1] int32 or int64, for gspo. The head's options are those of `linear_logprobs`, the
    loss's those of `policy_loss`; None weights: the mean over the rows that are not ignored.

    A row's coefficient g = d loss / d logp depends on its own log-probability alone, known once its row is folded, so

        dZ_v = g ([v = target] - p_v) + entropy_coef w p_v (log p_v + H)
        dX = dZ W        dW = dZ^T X        db = sum_t dZ_t

    are formed from the logits of a block of rows before the next block overwrites them; `linear_logprobs` has to
    compute them a second time. gspo's g depends on every row of its sequence. On CPU blocks end between sequences, and
    for a sequence longer than a block the logits are computed twice (4 GEMMs for its rows). On CUDA, where the host
    does not know the sequences' ends, all rows take 3 GEMMs if they fit into one block (1.45 GB of logits at 2 bytes,
    4 for float32: 4736 rows of V = 152064 in bfloat16) and 4 if they do not; without `old_logprobs`, where every ratio
    is 1, always 3. dZ has the inputs' dtype on CUDA, for 16-bit tensor cores take no other; sums, loss and statistics
    are float32. `logprobs` and `entropy` are as exact as those of `linear_logprobs`, and on CUDA the same bits.

    Only `loss` is differentiable, once; gradients are formed in the forward pass, only for inputs that require them, in
    float32 (float64), and rounded to the input's dtype in the backward pass. `logprobs` and `entropy` are [T] float32,
    0 in rows that are ignored or weigh 0: those rows are never read.

    Raises what `linear_logprobs` and `policy_loss` raise.
    """
    hidden, weight, bias = as_for_linear(hidden, weight, bias)
    check = Checker()
    number, per_row = check_head(check, hidden, weight, targets, bias, temperature, softcap)
    acc = acc_dtype(hidden.dtype)
    check("advantages", advantages, "T", (acc,))
    optional = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "token_weights": token_weights}
    for name, x in optional.items():
        if x is not None:
            check(name, x, "T", (acc,))
    check_sequences(check, cu_seqlens, kind)
    clip_low = default_clip_low(kind) if clip_low is None else clip_low
    constants = {"advantages": advantages, **optional}
    check_options(constants, kind, clip_low, clip_high, dual_clip, kl_coef, kl_estimator)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    loss, metrics, logprobs, entropy, *_ = _forward(
        hidden,
        weight,
        targets,
        advantages,
        old_logprobs,
        ref_logprobs,
        token_weights,
        cu_seqlens,
        bias,
        number,
        per_row,
        softcap,
        ignore_index,
        kind,
        float(clip_low),
        float(clip_high),
        math.inf if dual_clip is None else float(dual_clip),
        float(kl_coef),
        kl_estimator,
        float(entropy_coef),
        *wanted,
    )
    return PolicyLoss(loss, logprobs, entropy, PolicyMetrics(*metrics.unbind()))


@torch.library.custom_op("qrm_fast::linear_policy_loss", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    token_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    kind: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, metrics, logprobs, entropy, and the gradients of hidden, weight, bias: [0] where one is not needed."""
    acc = acc_dtype(hidden.dtype)
    keep = targets != ignore_index
    if token_weights is not None:
        keep = keep & (token_weights != 0)
    weights = keep.to(acc) / keep.sum().clamp(min=1) if token_weights is None else token_weights.where(keep, 0)
    targets = targets.where(keep, ignore_index)
    wide = [None if x is None else x.to(acc) for x in (hidden, weight, bias)]
    head = (wide[0], wide[1], targets, wide[2], temperature, temperatures, softcap, ignore_index)
    logprobs, entropy, lse, residual = linear_logprobs_forward._init_fn(*head)
    loss, metrics, dlogprobs, dentropy = policy_loss_forward._init_fn(
        logprobs,
        advantages,
        entropy,
        old_logprobs,
        ref_logprobs,
        weights,
        cu_seqlens,
        kind,
        clip_low,
        clip_high,
        dual_clip,
        kl_coef,
        kl_estimator,
        entropy_coef,
    )
    gradients = linear_logprobs_backward._init_fn(
        dlogprobs, dentropy, *head, entropy, lse, residual, need_hidden, need_weight, need_bias
    )
    return loss, metrics, logprobs, entropy, *gradients


@_forward.register_fake
def _(hidden, weight, targets, *rest):
    need_hidden, need_weight, need_bias = rest[-3:]
    x = hidden.new_empty(0, dtype=acc_dtype(hidden.dtype))
    return (
        x.new_empty(()),
        x.new_empty(len(PolicyMetrics._fields)),
        x.new_empty(targets.shape),
        x.new_empty(targets.shape),
        x.new_empty(hidden.shape if need_hidden else 0),
        x.new_empty(weight.shape if need_weight else 0),
        x.new_empty(weight.shape[0] if need_bias else 0),
    )


def _setup_context(ctx, inputs, output):
    hidden, weight, bias = inputs[0], inputs[1], inputs[8]
    _, metrics, logprobs, entropy, *gradients = output
    ctx.mark_non_differentiable(metrics, logprobs, entropy, *gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, *gradients)
    ctx.num_inputs = len(inputs)


def _autograd(ctx, grad_loss, *_):
    saved = ctx.saved_tensors  # once: activation checkpointing computes them again at every look
    inputs, gradients = saved[:3], saved[3:]
    grads = [None] * ctx.num_inputs
    for place, x, gradient in zip((0, 1, 8), inputs, gradients, strict=True):
        if grad_loss is not None and ctx.needs_input_grad[place]:
            grads[place] = _scaled(grad_loss, gradient, x)
    return tuple(grads)


def _scaled(grad_loss: Tensor, gradient: Tensor, x: Tensor) -> Tensor:
    """`scaled_derivative`, in place where nobody can see: a second [V, D] would double the memory of weight's gradient.

    A graph that is kept (`retain_graph`) may be walked again, and a gradient that is to be differentiated must raise.
    """
    kept = torch._C._autograd._get_current_graph_task_keep_graph()  # what AOTAutograd asks before it reuses a buffer
    if kept or torch.is_grad_enabled() or gradient.dtype != x.dtype:
        return scaled_derivative(grad_loss, gradient, x)
    if type(gradient) is not Tensor:  # traced: it may be an output of the graph, and the compiler reuses its memory
        return gradient * grad_loss
    return gradient if grad_loss.is_cpu and grad_loss == 1 else gradient.mul_(grad_loss)  # on CUDA asking would wait


_forward.register_autograd(_autograd, setup_context=_setup_context)
