"""How much an update listens to each token, by what the policy says of it before it moves."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.segments import sequence_sum
from . import ranks
from .config import Config
from .policy import Policy
from .rewards import Packed


class Weighed(NamedTuple):
    advantages: Tensor  # [T] float32
    old_logprobs: Tensor  # [T] float32, of PPO's ratio
    metrics: dict[str, Tensor]  # 0-d by name, of the tokens of all processes


def weigh_tokens(policy: Policy, packed: Packed, advantages: Tensor, config: Config) -> Weighed:
    """`advantages` [T] with the weights of `top_entropy` and `importance` in them.

        top_entropy   0 on all tokens but this share of those of all processes, the ones of highest entropy
                      (arXiv 2506.01939)
        importance    A_t w(rho), where rho is pi(a_t) / mu(a_t), or the product of these over the answer of t, with mu
                      the sampler and pi, the policy, as the old one of PPO's ratio

            truncate-token, truncate-sequence    w = min(rho, max_importance)
            mask-token, mask-sequence            w = rho up to max_importance, 0 above it

    A loss is linear in an advantage times a number >= 0, so these are weights of the loss. One forward pass.
    """
    scored = [policy(batch, temperature=config.temperature) for batch in packed.batches]
    old, entropy = torch.cat([x.logprobs for x in scored]), torch.cat([x.entropy for x in scored])
    if config.top_entropy < 1:
        everyone = torch.cat(ranks.gather_objects(entropy.cpu()))
        threshold = everyone.topk(max(1, round(config.top_entropy * len(everyone)))).values[-1]
        advantages = advantages.where(entropy >= threshold.to(entropy.device), 0.0)
    if config.importance == "none":
        return Weighed(advantages, packed.logprobs, {})
    how, _, of = config.importance.partition("-")
    log_ratio = old - packed.logprobs
    if of == "sequence":
        log_ratio = sequence_sum(log_ratio, packed.cu_seqlens)[packed.answer_of_token()]
    ratio = log_ratio.exp()
    above = ratio > config.max_importance
    weights = ratio.masked_fill(above, config.max_importance if how == "truncate" else 0.0)
    sums = torch.stack([weights.sum(), above.sum().to(weights), torch.full_like(weights.sum(), len(weights))])
    weight, num_above, num_tokens = ranks.gather(sums).sum(0)
    metrics = {"rollout/importance_mean": weight / num_tokens, "rollout/importance_above": num_above / num_tokens}
    return Weighed(advantages * weights, old, metrics)
