"""Policy losses for `actor.policy_loss.loss_mode`: verl's `vanilla`, `cispo` and `gspo` by `policy_loss`."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import policy_loss
from ...ops.policy_loss import MAX_LOG_RATIO
from ..padded import agg_weights, row_bounds


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
    weights = agg_weights(mask, loss_agg_mode, **config.global_batch_info)
    # Weights of the rollout are not negative, so a bound on w A is w times the bound on A.
    scaled = advantages if rollout_is_weights is None else advantages * rollout_is_weights
    logprobs, old, scaled = (x.float().reshape(-1) for x in (log_prob, old_log_prob.detach(), scaled.detach()))
    loss = policy_loss(
        logprobs,
        scaled,
        old_logprobs=old,
        token_weights=weights.flatten(),
        cu_seqlens=row_bounds(mask) if kind == "gspo" else None,
        kind=kind,
        clip_low=low,
        clip_high=high,
        dual_clip=dual_clip,
    ).loss
    return loss, _metrics(kind, log_prob.detach() - old_log_prob, advantages, mask, low, high, dual_clip)


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
