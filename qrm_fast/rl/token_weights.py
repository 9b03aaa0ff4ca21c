"""How much an update listens to each token, by what the policy says of it before it moves."""

import torch
from torch import Tensor

from . import ranks
from .config import Config
from .policy import Policy
from .rewards import Packed


def weigh_tokens(policy: Policy, packed: Packed, advantages: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Advantages [T] with the weights of `top_entropy` and `max_importance` in them, and the old log-probabilities [T].

        top_entropy      0 on all tokens but this share of those of all processes, the ones of highest entropy
                         (arXiv 2506.01939)
        max_importance   A_t min(pi(a_t) / mu(a_t), max_importance), with mu the sampler and pi, the policy, as the old
                         one of PPO's ratio: truncated importance sampling

    A loss is linear in an advantage times a number >= 0, so these are weights of the loss. One forward pass.
    """
    scored = [policy(batch, temperature=config.temperature) for batch in packed.batches]
    old, entropy = torch.cat([x.logprobs for x in scored]), torch.cat([x.entropy for x in scored])
    if config.top_entropy < 1:
        everyone = torch.cat(ranks.gather_objects(entropy.cpu()))
        threshold = everyone.topk(max(1, round(config.top_entropy * len(everyone)))).values[-1]
        advantages = advantages.where(entropy >= threshold.to(entropy.device), 0.0)
    if config.max_importance:
        return advantages * (old - packed.logprobs).exp().clamp(max=config.max_importance), old
    return advantages, packed.logprobs
