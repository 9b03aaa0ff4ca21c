"""slime: PPO over the tokens that are trained on, with token rewards (a Q-RM's, a PRM's) where the rollout has them.

    --advantage-estimator ppo --custom-advantage-function-path slime_advantages.advantages

slime calls `fn(args, rollout_data)` after its KL pass; every entry is a list with one tensor per answer, and the
function adds "advantages" and "returns" of the same lengths. An answer may end in tool output (`loss_masks` 0): its
reward then goes to the last trained token, masked tokens earn nothing and the recurrence passes over them without a
discount. With context parallelism the lists are parts of answers, and this function is not for them.
"""

import torch

from qrm_fast import gae
from qrm_fast.integrations.rewards import onto_trainable


def advantages(args, rollout_data):
    lengths = [len(mask) for mask in rollout_data["loss_masks"]]
    mask = torch.cat(rollout_data["loss_masks"]).bool()  # [T]
    values = torch.cat(rollout_data["values"]).float()
    ends = torch.tensor(lengths, device=mask.device).cumsum(0)
    cu_seqlens = torch.cat([ends.new_zeros(1), ends])

    terminal = torch.as_tensor(rollout_data["rewards"], dtype=torch.float32, device=mask.device)  # [S]
    some = [i for i, length in enumerate(lengths) if length > 0]
    rewards = torch.zeros_like(values).index_put((ends[some] - 1,), terminal[some])
    rewards = onto_trainable(rewards, cu_seqlens, mask)
    rewards = rewards - args.kl_coef * torch.cat(rollout_data["kl"]).float()
    if "token_rewards" in rollout_data:
        rewards = rewards + torch.cat(rollout_data["token_rewards"]).float()

    out = gae(rewards, values, cu_seqlens, gamma=args.gamma, lam=args.lambd, mask=mask)
    rollout_data["advantages"] = list(out.advantages.split(lengths))
    rollout_data["returns"] = list(out.returns.split(lengths))
