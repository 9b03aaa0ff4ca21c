"""One update of the loop, loss and gradients, with the prompt of a group computed once or once for each answer."""

import math
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from qrm_fast import PackedBatch, pack

from .harness import Case, case, gemm
from .qwen2 import assert_no_further, in_float32, policy_of

GROUP = 8


def shared_prompts(device: torch.device, prompt: int, groups: int = 2, answer: int = 160, **size: Any) -> Case:
    """8 answers, of log-normal length around `answer`, to each prompt; float32, and of a published shape bfloat16."""
    policy = policy_of(device, **size)
    model = policy.model.train()
    vocabulary, width = policy.head().weight.shape
    num_parameters = sum(p.numel() for p in model.model.layers.parameters())
    generator = torch.Generator().manual_seed(0)
    lengths = torch.exp(torch.randn(groups, GROUP, generator=generator) * 0.6 + math.log(answer))
    lengths = lengths.clamp(8, 5 * answer).long().sort().values
    sequences = []
    for row in lengths.tolist():
        question = torch.randint(2, vocabulary, (prompt,), generator=generator).tolist()
        sequences += [question + torch.randint(2, vocabulary, (n,), generator=generator).tolist() for n in row]

    def packed(share_prompts: bool, num_answers: int = groups * GROUP) -> PackedBatch:
        return pack(sequences[:num_answers], [prompt] * num_answers, share_prompts=share_prompts, device=device)

    shared, apart = packed(True), packed(False)
    num_actions = len(shared.action_index)
    advantages = torch.randn(num_actions, generator=generator).to(device)

    def update(batch: PackedBatch, policy: Any = policy) -> tuple[Tensor, list[Tensor]]:
        loss = policy.loss(batch, advantages[: len(batch.action_index)]).loss
        return loss.detach(), list(torch.autograd.grad(loss, list(policy.parameters())))

    def gate() -> None:
        if model.dtype != torch.float32:  # the answers to one prompt, whose float32 pass fits
            ways = (update(packed(x, GROUP))[1] for x in (True, False))
            assert_no_further(*ways, update(packed(False, GROUP), in_float32(policy))[1])
            return
        (loss, gradients), (expected, theirs) = (update(batch) for batch in (shared, apart))
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        a, b = (torch.cat([x.flatten() for x in xs]) for xs in (gradients, theirs))
        assert (a - b).norm() <= 1e-5 * b.norm(), f"gradients differ by {(a - b).norm() / b.norm():.2g} of their norm"

    one = 2 * num_actions * vocabulary * width  # the logits, once
    flops = 6 * len(shared.input_ids) * num_parameters + 3 * one  # attention's own products left out
    weight = policy.head().weight.detach()
    return Case(
        {"qrm_fast, a prompt per group": lambda: update(shared), "a prompt per answer": lambda: update(apart)},
        gate=gate,
        baseline=gemm(torch.randn(num_actions, width).to(weight), weight),
        num_baselines=flops / one,
        flops=flops,
        repeats=3,
    )


if find_spec("transformers"):
    shapes = [{"prompt": n, "width": 256, "num_layers": 6} for n in (64, 200, 600)]
    published = [{"shape": "1.5b", "prompt": n, "groups": m, "answer": 160} for n, m in ((200, 4), (600, 2))]
    case(cpu=[*shapes, {"prompt": 200, "width": 512, "num_layers": 8}], cuda=published)(shared_prompts)
