"""One update of the loop, loss and gradients, with the prompt of a group computed once or once for each answer."""

import math
from importlib.util import find_spec

import torch
from torch import Tensor

from qrm_fast import PackedBatch, pack

from .harness import Case, case, gemm
from .qwen2 import VOCABULARY, qwen2

GROUPS, GROUP, ANSWER = 2, 8, 160


def shared_prompts(device: torch.device, prompt: int, width: int, num_layers: int) -> Case:
    """8 answers, of log-normal length around 160, to each of 2 prompts; float32."""
    from qrm_fast.rl.linear import use_onednn
    from qrm_fast.rl.policy import Policy

    model, num_parameters = qwen2(width, num_layers)
    model.set_attn_implementation("qrm_packed")
    use_onednn(model)
    policy = Policy(model.train())
    generator = torch.Generator().manual_seed(0)
    lengths = torch.exp(torch.randn(GROUPS, GROUP, generator=generator) * 0.6 + math.log(ANSWER)).clamp(8, 800).long()
    sequences = []
    for row in lengths.sort().values.tolist():
        question = torch.randint(2, VOCABULARY, (prompt,), generator=generator).tolist()
        sequences += [question + torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in row]
    shared, apart = (pack(sequences, [prompt] * len(sequences), share_prompts=x, device=device) for x in (True, False))
    num_actions = len(shared.action_index)
    advantages = torch.randn(num_actions, generator=generator)

    def update(batch: PackedBatch) -> tuple[Tensor, list[Tensor]]:
        loss = policy.loss(batch, advantages).loss
        return loss.detach(), list(torch.autograd.grad(loss, list(policy.parameters())))

    def gate() -> None:
        (loss, gradients), (expected, theirs) = (update(batch) for batch in (shared, apart))
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        a, b = (torch.cat([x.flatten() for x in xs]) for xs in (gradients, theirs))
        assert (a - b).norm() <= 1e-5 * b.norm(), f"gradients differ by {(a - b).norm() / b.norm():.2g} of their norm"

    one = 2 * num_actions * VOCABULARY * width  # the logits, once
    flops = 6 * len(shared.input_ids) * num_parameters + 3 * one  # attention's own products left out
    return Case(
        {"qrm_fast, a prompt per group": lambda: update(shared), "a prompt per answer": lambda: update(apart)},
        gate=gate,
        baseline=gemm(torch.randn(num_actions, width), torch.randn(VOCABULARY, width)),
        num_baselines=flops / one,
        flops=flops,
        repeats=3,
    )


if find_spec("transformers"):
    shapes = [{"prompt": n, "width": 256, "num_layers": 6} for n in (64, 200, 600)]
    case(cpu=[*shapes, {"prompt": 200, "width": 512, "num_layers": 8}])(shared_prompts)
