"""Policy-gradient losses over packed action rows, their metrics and their gradients, in one pass."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import FLOATS, INTS, Checker
from .dtypes import acc_dtype
from .segments import sequence_ids, sequence_sum

KINDS = ("ppo", "reinforce", "cispo", "gspo", "sapo")
KL_ESTIMATORS = ("k1", "k2", "k3", "unbiased")
MAX_LOG_RATIO = 20.0
SAPO_TEMPERATURE_BELOW = 1.05  # of A < 0; 1 of other rows


class PolicyMetrics(NamedTuple):
    """0-d float32: sums over tokens with the loss's weights, so they add over micro-batches; ratio_max is a maximum."""

    clip_low: Tensor  # ratio < 1 - clip_low and A < 0
    clip_high: Tensor  # ratio > 1 + clip_high and A > 0
    approx_kl: Tensor  # (r - 1) - log r of the token's own r = exp(logprobs - old_logprobs)
    ref_kl: Tensor  # kl_estimator of logprobs - ref_logprobs; 0 without them
    ratio: Tensor  # the loss's: r, for gspo the sequence's s; 1 without old_logprobs
    entropy: Tensor  # 0 where entropy is None
    ratio_max: Tensor  # 0 without a row of non-zero weight


class PolicyLoss(NamedTuple):
    loss: Tensor  # 0-d float32
    logprobs: Tensor  # [T], the argument
    entropy: Tensor | None  # [T], the argument
    metrics: PolicyMetrics


def policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    *,
    entropy: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    token_weights: Tensor | None = None,
    kind: str = "ppo",
    clip_low: float | None = None,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
) -> PolicyLoss:
    """Policy-gradient loss of packed action rows, with its metrics; differentiable in `logprobs` and `entropy`.

    `logprobs`: [T] floating, log pi(a_t | s_t). `entropy`, `old_logprobs`, `ref_logprobs`: [T], dtype of `logprobs`.
    `advantages`, `token_weights`: [T] float32 (float64 beside float64). `cu_seqlens`: [S+1] int32 or int64, for gspo.
    `loss` and `metrics`: 0-d float32 (float64).

        loss = sum_t w_t (l_t + kl_coef KL_t - entropy_coef H_t)        r_t = exp(logp_t - old_t)
        ppo:        l_t = max(-A_t r_t, -A_t clip(r_t, 1 - clip_low, 1 + clip_high)),
                    at most -A_t dual_clip where A_t < 0 and dual_clip is given
        reinforce:  l_t = -A_t logp_t
        cispo:      l_t = -sg(clip(r_t, 1 - clip_low, 1 + clip_high)) A_t logp_t
        gspo:       as ppo with sg(s) exp(logp_t - sg(logp_t)) for r_t,  s = exp(mean logp - old over the sequence)
        sapo:       l_t = -A_t (4 / tau) sigmoid(tau (r_t - 1)),  tau = 1.05 where A_t < 0, else 1
        KL_t, d = logp_t - ref_t:        k1: d        k2: d^2 / 2        k3: exp(-d) - 1 + d        unbiased: r_t k3

    sg stops the gradient. (PPO: Schulman et al., arXiv 1707.06347, eq. 7; dual clip: Ye et al., arXiv 1912.09729,
    eq. 5, which is also the two-sided bound delta of INTELLECT-2, arXiv 2505.07291; CISPO: MiniMax-M1, arXiv
    2506.13585, eq. 4; GSPO: Zheng et al., arXiv 2507.18071, eq. 13, the token form; SAPO: Gao et al., arXiv 2511.20347,
    with its temperatures; KL estimators: Schulman, "Approximating KL Divergence", 2020, differentiated as they stand;
    unbiased: DeepSeek-V3.2, arXiv 2512.02556, whose gradient, r_t d, is in expectation that of the divergence itself.)
    `clip_low` None: 0.2, and 1 for cispo, which is no lower bound, as its authors train. A log-ratio beyond +-20 counts
    as 20 in r, s and in the exponential of k3, and r and s have no gradient there: no ratio overflows, and an
    advantage of 0 gives 0.
    `token_weights` None: the mean over all T rows, 0 where T = 0. Weight 0 masks a row: whatever it holds, NaN
    included, reaches neither loss nor metrics nor its sequence's mean, and its gradients are 0. `old_logprobs` None:
    on-policy, the ratio is 1 and carries the gradient A_t; reinforce uses them in the metrics and in an unbiased KL.
    Sums are deterministic for any number of threads. All tensors but `logprobs` and `entropy` are constants.

    Raises TypeError or ValueError for a wrong dtype, shape or device, an unknown kind or kl_estimator, a coefficient
    whose tensor is missing, a negative clip range, dual_clip <= 1 or with another kind than ppo and gspo, gspo without
    cu_seqlens or cu_seqlens without gspo, a constant that requires grad, and, on CPU, ValueError where cu_seqlens do
    not start at 0, decrease, or do not end at T.
    """
    check = Checker()
    check("logprobs", logprobs, "T", FLOATS)
    acc = acc_dtype(logprobs.dtype)
    check("advantages", advantages, "T", (acc,))
    optional = {
        "entropy": (entropy, logprobs.dtype),
        "old_logprobs": (old_logprobs, logprobs.dtype),
        "ref_logprobs": (ref_logprobs, logprobs.dtype),
        "token_weights": (token_weights, acc),
    }
    for name, (x, dtype) in optional.items():
        if x is not None:
            check(name, x, "T", (dtype,))
    check_sequences(check, cu_seqlens, kind)
    clip_low = default_clip_low(kind) if clip_low is None else clip_low
    constants = {"advantages": advantages, "old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs}
    check_options(
        {**constants, "token_weights": token_weights}, kind, clip_low, clip_high, dual_clip, kl_coef, kl_estimator
    )
    if entropy_coef != 0 and entropy is None:
        raise ValueError(f"entropy_coef needs entropy, got entropy_coef {entropy_coef} without it")
    loss, metrics, _, _ = _policy_loss(
        logprobs,
        advantages,
        entropy,
        old_logprobs,
        ref_logprobs,
        token_weights,
        cu_seqlens,
        kind,
        float(clip_low),
        float(clip_high),
        math.inf if dual_clip is None else float(dual_clip),
        float(kl_coef),
        kl_estimator,
        float(entropy_coef),
    )
    return PolicyLoss(loss, logprobs, entropy, PolicyMetrics(*metrics.unbind()))


def default_clip_low(kind: str) -> float:
    return 1.0 if kind == "cispo" else 0.2


def check_sequences(check: Checker, cu_seqlens: Tensor | None, kind: str) -> None:
    """Raise for boundaries that are no [S+1] integers, that gspo lacks, or that another kind would not read."""
    if cu_seqlens is not None:
        check("cu_seqlens", cu_seqlens, "S+1", INTS)
    if (cu_seqlens is not None) != (kind == "gspo"):
        given = "without them" if cu_seqlens is None else "with them"
        raise ValueError(f"cu_seqlens belong to kind 'gspo' and to no other, got kind {kind!r} {given}")


def check_options(
    constants: dict[str, Tensor | None],
    kind: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    kl_coef: float,
    kl_estimator: str,
) -> None:
    """Raise ValueError for a constant that requires grad and for options that are unknown or do not go together."""
    for name, x in constants.items():
        if x is not None and x.requires_grad:
            raise ValueError(f"{name} must not require grad, it is a constant of the loss: pass {name}.detach()")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if kl_estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator must be one of {', '.join(KL_ESTIMATORS)}, got {kl_estimator!r}")
    if not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(f"clip_low and clip_high must be >= 0, got {clip_low} and {clip_high}")
    if dual_clip is not None and not (dual_clip > 1 and kind in ("ppo", "gspo")):
        raise ValueError(f"dual_clip must be > 1 and belongs to kinds 'ppo' and 'gspo', got {dual_clip} with {kind!r}")
    if kl_coef != 0 and constants["ref_logprobs"] is None:
        raise ValueError(f"kl_coef needs ref_logprobs, got kl_coef {kl_coef} without them")


@torch.library.custom_op("qrm_fast::policy_loss", mutates_args=())
def _policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    entropy: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    token_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    kind: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = acc_dtype(logprobs.dtype)
    logp, adv = logprobs.to(acc), advantages
    weight = torch.full_like(logp, 1 / max(len(logp), 1)) if token_weights is None else token_weights
    keep = weight != 0
    own = log_ratio = logp - (logp if old_logprobs is None else old_logprobs.to(acc))
    if cu_seqlens is not None:
        sums, counts = (sequence_sum(x.double(), cu_seqlens) for x in (own.where(keep, 0), keep))
        log_ratio = (sums / counts)[sequence_ids(cu_seqlens, len(logp))]
    own = own.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().to(acc)
    if kind in ("ppo", "gspo"):
        surrogate, clipped = -adv * ratio, -adv * ratio.clamp(1 - clip_low, 1 + clip_high)
        loss = torch.maximum(surrogate, clipped)
        bounded = (adv < 0) & (loss > -adv * dual_clip)
        dlogp = surrogate.masked_fill((surrogate < clipped) | bounded | (log_ratio.abs() > MAX_LOG_RATIO), 0)
        loss = torch.where(bounded, -adv * dual_clip, loss)
    elif kind == "sapo":
        tau = torch.ones_like(adv).masked_fill(adv < 0, SAPO_TEMPERATURE_BELOW)
        x = tau * (ratio - 1)
        loss = -adv * (4 / tau) * x.sigmoid()
        dlogp = (-4 * adv * x.sigmoid() * (-x).sigmoid() * ratio).masked_fill(log_ratio.abs() > MAX_LOG_RATIO, 0)
    else:
        scale = ratio.clamp(1 - clip_low, 1 + clip_high) if kind == "cispo" else torch.ones_like(ratio)
        loss, dlogp = -scale * adv * logp, -scale * adv
    ref_kl = torch.zeros_like(logp)
    if ref_logprobs is not None:
        d = logp - ref_logprobs.to(acc)
        grown, r = torch.expm1((-d).clamp(max=MAX_LOG_RATIO)), own.exp()
        ref_kl, dkl = {
            "k1": (d, torch.ones_like(d)),
            "k2": (d * d / 2, d),
            "k3": (grown + d, -grown),
            "unbiased": (r * (grown + d), r * d),
        }[kl_estimator]
        if kl_coef != 0:
            loss, dlogp = loss + kl_coef * ref_kl, dlogp + kl_coef * dkl
    ent = torch.zeros_like(logp) if entropy is None else entropy.to(acc)
    if entropy_coef != 0:
        loss = loss - entropy_coef * ent
    rows = torch.stack(
        [
            loss,
            ((ratio < 1 - clip_low) & (adv < 0)).to(acc),
            ((ratio > 1 + clip_high) & (adv > 0)).to(acc),
            torch.expm1(own) - own,
            ref_kl,
            ratio,
            ent,
        ]
    )
    sums = (rows * weight).where(keep, 0).sum(1)
    ratio_max = torch.cat([ratio.where(keep, 0), ratio.new_zeros(1)]).amax(0, keepdim=True)
    dlogp = (weight * dlogp).where(keep, 0)
    dentropy = logp.new_empty(0) if entropy is None else (-entropy_coef * weight).where(keep, 0)
    return sums[0].clone(), torch.cat([sums[1:], ratio_max]), dlogp, dentropy


@_policy_loss.register_fake
def _(logprobs, advantages, entropy, *_):
    acc = acc_dtype(logprobs.dtype)
    dlogprobs = torch.empty_like(logprobs, dtype=acc)
    dentropy = logprobs.new_empty(0, dtype=acc) if entropy is None else torch.empty_like(dlogprobs)
    return dlogprobs.new_empty(()), dlogprobs.new_empty(len(PolicyMetrics._fields)), dlogprobs, dentropy


@torch.library.custom_op("qrm_fast::scaled_derivative", mutates_args=())
def scaled_derivative(grad_loss: Tensor, derivative: Tensor, x: Tensor) -> Tensor:
    """Gradient of `x`, in its dtype, from the derivative that the forward pass formed.

    Taking `x` makes a second derivative raise: `derivative` depends on it.
    """
    return (grad_loss * derivative).to(x.dtype)


@scaled_derivative.register_fake
def _(grad_loss, derivative, x):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    logprobs, _, entropy, *_ = inputs
    _, metrics, dlogprobs, dentropy = output
    ctx.mark_non_differentiable(metrics, dlogprobs, dentropy)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dlogprobs, logprobs, dentropy, entropy)


def _backward(ctx, grad_loss, *_):
    dlogprobs, logprobs, dentropy, entropy = ctx.saved_tensors
    grads = [None] * 14
    if grad_loss is not None and ctx.needs_input_grad[0]:
        grads[0] = scaled_derivative(grad_loss, dlogprobs, logprobs)
    if grad_loss is not None and ctx.needs_input_grad[2]:
        grads[2] = scaled_derivative(grad_loss, dentropy, entropy)
    return tuple(grads)


_policy_loss.register_autograd(_backward, setup_context=_setup_context)
