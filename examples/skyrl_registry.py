"""SkyRL: an advantage estimator and a policy loss for its registries; import this file before the trainer starts.

    trainer.algorithm.advantage_estimator=qrm_gae trainer.algorithm.policy_loss_type=qrm_ppo

SkyRL passes tensors [batch, length] by keyword, and to estimators also `values`, `gamma` and `lambd`.
"""

import torch
from skyrl.backends.skyrl_train.utils.ppo_utils import register_advantage_estimator, register_policy_loss

from qrm_fast import policy_loss
from qrm_fast.integrations.padded import compute_gae_advantage_return
from qrm_fast.integrations.rewards import onto_trainable


@register_advantage_estimator("qrm_gae")
def qrm_gae(token_level_rewards, response_mask, values, gamma, lambd, **_):
    """GAE past tokens that the policy did not write, whose rewards go to the action before them."""
    num_answers, width = response_mask.shape
    cu_seqlens = torch.arange(num_answers + 1, device=response_mask.device) * width
    rewards = onto_trainable(token_level_rewards.flatten(), cu_seqlens, response_mask.bool().flatten())
    return compute_gae_advantage_return(rewards.view(response_mask.shape), values, response_mask, gamma, lambd)


@register_policy_loss("qrm_ppo")
def qrm_ppo(log_probs, old_log_probs, advantages, config, loss_mask=None, rollout_logprobs=None):
    """SkyRL's dual_clip, summed over tokens: the loss reduction is in its advantages. Without off-policy correction."""
    mask = torch.ones_like(advantages) if loss_mask is None else loss_mask
    out = policy_loss(
        log_probs.flatten(),
        advantages.float().flatten(),
        old_logprobs=old_log_probs.to(log_probs.dtype).flatten(),
        token_weights=mask.float().flatten(),
        clip_low=config.eps_clip_low,
        clip_high=config.eps_clip_high,
        dual_clip=config.clip_ratio_c,
    )
    count = mask.sum().clamp(min=1)
    metrics = {
        "clip_ratio": (out.metrics.clip_low + out.metrics.clip_high) / count,
        "ppo_kl": out.metrics.approx_kl / count,
    }
    return out.loss, {name: x.item() for name, x in metrics.items()}
