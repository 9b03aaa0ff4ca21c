"""Policy losses for `actor.policy_loss.loss_mode`: verl's `vanilla`, `cispo` and `gspo` by `policy_loss`."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import loss_weights, policy_loss
from ...ops.policy_loss import MAX_LOG_RATIO
from .estimators import row_bounds


def _policy_loss(
    kind: str,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """0-d loss and verl's metrics of a padded micro-batch, all tensors [B, T].

    Of `config`, verl's `actor`: `clip_ratio`, `clip_ratio_low`, `clip_ratio_high`, for "ppo" `clip_ratio_c`, and
    `global_batch_info`, whose denominators make the losses of micro-batches and ranks add up. `rollout_is_weights`
    scale each token's loss. A log-ratio counts as 20 beyond +-20, in "gspo" too, where verl bounds it at 10 from above.
    """
    mask = response_mask != 0
    low, high = (config.clip_ratio if c is None else c for c in (config.clip_ratio_low, config.clip_ratio_high))
    dual_clip = config.get("clip_ratio_c", 3.0) if kind == "ppo" else None
    weights = token_weights(mask, loss_agg_mode, **config.global_batch_info)
    # Weights of the rollout are not negative, so a bound on w A is w times the bound on A.
    scaled = advantages if rollout_is_weights is None else advantages * rollout_is_weights
    logprobs, old, scaled = (x.float().reshape(-1) for x in (log_prob, old_log_prob.detach(), scaled.detach()))
    loss = policy_loss(
        logprobs,
        scaled,
        old_logprobs=old,
        token_weights=weights.reshape(-1),
        cu_seqlens=row_bounds(mask.shape, mask.device) if kind == "gspo" else None,
        kind=kind,
        clip_low=low,
        clip_high=high,
        dual_clip=dual_clip,
    ).loss
    return loss, _metrics(kind, log_prob.detach() - old_log_prob, advantages, mask, low, high, dual_clip)


def token_weights(
    mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: float | None = None,
) -> Tensor:
    """[B, T] float32 w with which verl's `agg_loss(x, mask, loss_agg_mode, ...)` is the sum of w x; 0 off the mask.

    `mask`: [B, T] bool. Raises ValueError for an unknown mode, and for several ranks without the count of all.
    """
    if loss_agg_mode == "token-sum":
        return mask.float() * dp_size
    by_tokens = loss_agg_mode == "token-mean"
    name, total = ("batch_num_tokens", batch_num_tokens) if by_tokens else ("global_batch_size", global_batch_size)
    if total is None and dp_size > 1:
        raise ValueError(f"{name} must be given for {loss_agg_mode!r} on {dp_size} ranks, got None")
    normed = loss_agg_mode == "seq-mean-token-sum-norm"
    weights = loss_weights(
        row_bounds(mask.shape, mask.device),
        mask=mask.reshape(-1),
        mode=loss_agg_mode,
        global_tokens=batch_num_tokens,
        global_sequences=global_batch_size,
        norm=(loss_scale_factor or mask.shape[1]) if normed else None,
    )
    return weights.view(mask.shape) * dp_size


@torch.no_grad()
def _metrics(
    kind: str, log_ratio: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float, dual_clip: float | None
) -> dict[str, float]:
    """verl's, means over the tokens of the mask; one wait for the device."""

    def mean(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0).sum() / (mask.sum() + 1e-8)

    own = log_ratio if kind == "gspo" else log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = own.exp()
    if kind == "gspo":
        ratio = (torch.where(mask, own, 0).sum(1) / mask.sum(1).clamp(min=1)).exp()[:, None].expand_as(own)
    under, over = ratio < 1 - low, ratio > 1 + high
    clipped = under | over if kind == "cispo" else (under & (advantages < 0)) | (over & (advantages > 0))
    bounded = torch.zeros_like(clipped)
    if dual_clip is not None:
        bounded = (advantages < 0) & (torch.maximum(ratio, ratio.clamp(1 - low, 1 + high)) > dual_clip)
    names = "actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"
    values = torch.stack([mean(clipped.float()), mean(-own), mean(bounded.float())])
    return dict(zip(names, values.tolist(), strict=True))


LOSSES = {f"qrm_{kind}": partial(_policy_loss, kind) for kind in ("ppo", "cispo", "gspo")}
