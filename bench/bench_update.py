"""An update of the loop on a GPU, from packed answers to new weights, as a share of what it multiplies at most."""

import math
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qrm_fast import pack

from .harness import Case, case, gemm
from .qwen2 import assert_no_further, in_float32, policy_of
from .slot import LIMITS

GROUP = 8


def whole_update(device: torch.device, shape: str, num_tokens: int, prompt: int, answer: int) -> Case:
    """Loss, gradients and AdamW of bfloat16 weights with float32 masters: 8 answers, of log-normal length around
    `answer`, to each of as many prompts as `num_tokens` packed rows hold. Padded, 8 answers are a micro-batch.

    FLOPs are those of flops.py, the numerator of MFU: no prompt twice, no padding, nothing computed again. Tokens are
    those of prompts and answers, each answer with its prompt.
    """
    from qrm_fast.rl.config import Config, preset
    from qrm_fast.rl.cost_model import work_of
    from qrm_fast.rl.flops import update_flops
    from qrm_fast.rl.optimizer import AdamW
    from qrm_fast.rl.update import Denominators, MicroBatch, update

    policy = policy_of(device, shape=shape)
    model, optimizer = policy.model.train(), AdamW(policy.parameters())
    vocabulary, width = policy.head().weight.shape
    generator = torch.Generator().manual_seed(0)

    def words(n: int) -> list[int]:
        return torch.randint(vocabulary, (n,), generator=generator).tolist()

    lengths: list[int] = []
    while True:
        drawn = torch.exp(torch.randn(GROUP, generator=generator) * 0.5 + math.log(answer))
        more = lengths + drawn.clamp(8, 2 * answer).long().sort().values.tolist()
        if lengths and work_of(prompt, more, GROUP).num_rows > num_tokens:
            break
        lengths = more
    work = work_of(prompt, lengths, GROUP)
    questions = [words(prompt) for _ in range(len(lengths) // GROUP)]
    sequences = [questions[s // GROUP] + words(n) for s, n in enumerate(lengths)]
    batch = pack(sequences, [prompt] * len(lengths), share_prompts=True, device=device)
    advantages = torch.randn(work.num_actions, generator=generator).to(device)
    with torch.no_grad():
        old_logprobs = policy(batch).logprobs
    microbatch = MicroBatch(batch, advantages, advantages, old_logprobs, None)
    denominators = Denominators(len(lengths), work.num_actions)
    config = Config(model="", data="", out="", **preset("rloo", "ppo"))

    def ours() -> Tensor:
        model.set_attn_implementation("qrm_packed")
        return update(policy, optimizer, [microbatch], denominators, config, lr=0.0).grad_norm

    def padded(model: Any, group: int) -> Tensor:
        """The loss of a group's answers, through all their logits."""
        first = group * GROUP
        rows = pad_sequence([torch.tensor(x) for x in sequences[first : first + GROUP]], True).to(device)
        sizes = torch.tensor(lengths[first : first + GROUP], device=device)[:, None]
        mask = torch.arange(rows.shape[1], device=device) < prompt + sizes  # [8, L]
        kept = rows.shape[1] - prompt + 1
        logits = model(input_ids=rows, attention_mask=mask.long(), use_cache=False, logits_to_keep=kept).logits
        logp = logits[:, :-1].float().log_softmax(-1).gather(-1, rows[:, prompt:, None])[..., 0]
        start = sum(lengths[:first])
        taken = advantages[start : start + sum(lengths[first : first + GROUP])]
        return -(taken * logp[mask[:, prompt:]]).sum() / work.num_actions

    def theirs() -> Tensor:
        model.set_attn_implementation("sdpa")
        for group in range(len(questions)):
            padded(model, group).backward()
        return optimizer.step(0.0, config.max_grad_norm)

    def gradients(loss: Tensor, policy: Any = policy) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(policy.parameters())))

    def gate() -> None:
        """Gradients of the first group, whose float32 pass fits."""
        model.set_attn_implementation("qrm_packed")
        first = pack(sequences[:GROUP], [prompt] * GROUP, share_prompts=True, device=device)
        num_actions = len(first.action_index)
        weights = torch.full_like(advantages[:num_actions], 1 / work.num_actions)
        own = gradients(policy.loss(first, advantages[:num_actions], token_weights=weights).loss)
        model.set_attn_implementation("sdpa")
        exact = in_float32(policy)
        assert_no_further(own, gradients(padded(model, 0)), gradients(padded(exact.model, 0), exact))

    flops = update_flops(policy).total(work.num_rows, work.num_actions, work.num_pairs)
    peaks = {f"MFU of {peak / 1e12:.0f} TFLOP/s, {whose}": peak for whose, peak in known_peaks(device).items()}
    one = 2 * work.num_actions * vocabulary * width  # the logits, once
    weight = policy.head().weight.detach()
    return Case(
        {"qrm_fast": ours, "transformers, padded, log_softmax": theirs},
        gate=gate,
        baseline=gemm(torch.randn(work.num_actions, width).to(weight), weight),
        num_baselines=flops / one,
        flops=int(flops),
        repeats=5,
        details=lambda way, ms: (
            {"tokens/s": 1e3 * work.num_tokens / ms} | {name: 1e3 * flops / ms / peak for name, peak in peaks.items()}
        ),
    )


def known_peaks(device: torch.device) -> dict[str, float]:
    """Dense bfloat16 FLOP/s: what was measured on such a GPU, and what its data sheet says."""
    from qrm_fast.rl.cost_model import SHEETS

    name = torch.cuda.get_device_name(device)
    peaks = {"measured": LIMITS[name][1]} if name in LIMITS else {}
    for gpu in SHEETS:
        if gpu.upper() in name:
            peaks["data sheet"] = SHEETS[gpu][0]
    return peaks


if find_spec("transformers"):
    case(cuda=[{"shape": "1.5b", "num_tokens": 16384, "prompt": 256, "answer": 384}])(whole_update)
