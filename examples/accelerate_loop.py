"""A loop of one's own on plain accelerate: sample, judge, and update on packed rows, with no padding and no logits.

    accelerate launch examples/accelerate_loop.py

The task is to answer with the prompt's token, over and over. Every token is judged by itself; the share of right ones
is printed each iteration.
"""

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, Qwen2Config

from qrm_fast import pack, policy_loss, whiten
from qrm_fast.rl.policy import Policy
from qrm_fast.rl.rollout import TransformersEngine


def main(iterations: int = 30, prompts_per_step: int = 16, answers: int = 8, max_new_tokens: int = 8) -> list[float]:
    accelerator = Accelerator()
    torch.manual_seed(0)  # every rank starts from the same weights
    sizes = dict(vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, tie_word_embeddings=True)
    config = Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, attn_implementation="qrm_packed")
    policy = Policy(AutoModelForCausalLM.from_config(config))
    policy, optimizer = accelerator.prepare(policy, torch.optim.AdamW(policy.parameters(), lr=1e-2))
    engine = TransformersEngine(accelerator.unwrap_model(policy), stop_ids=[0])
    shares = []
    for step in range(iterations):
        seed = step * accelerator.num_processes + accelerator.process_index
        generator = torch.Generator().manual_seed(seed)
        prompts = torch.randint(1, 32, (prompts_per_step, 1), generator=generator).tolist()
        rollout = engine.generate(
            prompts, num_samples=answers, max_new_tokens=max_new_tokens, temperature=1.0, seed=seed
        )
        asked = [prompt for prompt in prompts for _ in range(answers)]  # [S]
        sequences = [p + r for p, r in zip(asked, rollout.responses, strict=True)]
        batch = pack(sequences, [1] * len(asked), device=accelerator.device)
        tokens = batch.targets[batch.action_index]  # [T]
        right = (tokens == torch.tensor(asked, device=tokens.device)[batch.seq_ids, 0]).float()  # [T]
        advantages = whiten(right)
        loss = policy_loss(
            policy(batch).logprobs, advantages, old_logprobs=torch.cat(rollout.logprobs).to(tokens.device)
        ).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        shares.append(accelerator.reduce(right.mean(), "mean").item())
        accelerator.print(f"iteration {step}: share of right tokens {shares[-1]:.3f}")
    return shares


if __name__ == "__main__":
    main()
