"""Process rewards to token advantages: few bytes are read, one number per token is written, beside a copy."""

import torch
from torch import Tensor

from qrm_fast import process_advantages

from .harness import KEPT_MEMORY, Case, case, copy

WIDTH, NUM_STEPS, ANSWERS_PER_PROMPT, TEMPERATURE = 7168, 60, 8, 0.1


@case(
    cpu=[{"num_answers": 512, "lengths": "full"}, {"num_answers": 512, "lengths": "spread"}],
    cuda=[{"num_answers": 512, "lengths": "full"}, {"num_answers": 4096, "lengths": "spread"}],
)
def process_advantages_verl(device: torch.device, num_answers: int, lengths: str) -> Case:
    """Preset verl: answers of 60 steps, 8 to a prompt; `full` ones fill 7168 tokens, `spread` ones 120 to 7168."""
    generator = torch.Generator().manual_seed(0)
    num_rows = torch.full((num_answers,), WIDTH)
    if lengths == "spread":
        num_rows = (120 + 900 * torch.randn(num_answers, generator=generator).exp()).long().clamp(max=WIDTH)
    is_end = torch.zeros(num_answers, WIDTH, dtype=torch.bool)
    for i, n in enumerate(num_rows.tolist()):
        is_end[i, torch.randperm(n - 1, generator=generator)[: NUM_STEPS - 1]] = True
        is_end[i, n - 1] = True
    real = torch.arange(WIDTH) < num_rows[:, None]
    scores = torch.rand(is_end.shape, generator=generator).mul(2).sub(1).where(is_end, 0.0)
    outcomes = (torch.rand(num_answers, generator=generator) < 0.5).float()
    group_ids = torch.arange(num_answers) // ANSWERS_PER_PROMPT

    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), num_rows.cumsum(0)])
    rewards, step_ends, num_tokens = scores[is_end], is_end[real].nonzero()[:, 0], int(num_rows.sum())
    packed = [x.to(device) for x in (rewards, step_ends, cu_seqlens, group_ids)]
    packed_outcomes = outcomes.to(device)
    on_device = [x.to(device) for x in (scores, is_end, real, outcomes)]

    def ours() -> Tensor:
        return process_advantages(
            *packed, outcome_rewards=packed_outcomes, preset="verl", max_gen_len=WIDTH, num_tokens=num_tokens
        )

    def padded(scores: Tensor, is_end: Tensor, real: Tensor, outcomes: Tensor) -> Tensor:
        """The same on [answers, 7168], the baseline in a loop over answers."""
        weights = (-scores / TEMPERATURE).where(is_end, -torch.inf).softmax(1)
        reward = (weights * scores).where(is_end, 0.0)
        reward[torch.arange(num_answers), real.sum(1) - 1] += outcomes
        returns = reward.flip(1).cumsum(1).flip(1) * real
        totals = returns.sum(1)
        members: dict[int, list[Tensor]] = {}
        for i, group in enumerate(group_ids.tolist()):
            members.setdefault(group, []).append(totals[i])
        baseline = torch.empty_like(totals)
        for i, group in enumerate(group_ids.tolist()):
            others = len(members[group]) - 1
            baseline[i] = (torch.stack(members[group]).sum() - totals[i]) / (others * WIDTH)
        advantages = returns - baseline[:, None]
        count = real.sum()
        mean = (advantages * real).sum() / count
        variance = ((advantages - mean).square() * real).sum() / (count - 1)
        return (advantages - mean) * torch.rsqrt(variance + 1e-8) * real

    def gate() -> None:
        exact = padded(*(x.double() if x.is_floating_point() else x for x in (scores, is_end, real, outcomes)))[real]
        peer = padded(*on_device)[on_device[2]].cpu()
        assert (ours().cpu() - exact).abs().max() <= (peer - exact).abs().max()

    num_bytes = 4 * num_tokens + 12 * rewards.numel()
    return Case(
        {"qrm_fast": ours, "padded": lambda: padded(*on_device)},
        gate,
        baseline=copy(num_bytes, device),
        bytes=num_bytes,
    )


@case(
    environment=KEPT_MEMORY,
    cpu=[{"num_answers": 512, "lengths": "full"}, {"num_answers": 512, "lengths": "spread"}],
)
def process_advantages_verl_in_kept_memory(device: torch.device, num_answers: int, lengths: str) -> Case:
    return process_advantages_verl(device, num_answers, lengths)
