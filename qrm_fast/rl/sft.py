"""Supervised fine-tuning on demonstrations: the policy that reinforcement learning starts from."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .. import pack, plan_microbatches
from .attention import check_no_leak
from .checkpoint import save_checkpoint
from .data import Demonstration, fit, read_jsonl
from .metrics import MetricsLog, Phases
from .models import Dtype, check_context, load_policy
from .optimizer import AdamW, trapezoid
from .policy import Policy
from .ranges import Count, CountOrNone, NonNegative, Positive, Share, check_ranges
from .tokenizers import encode_prompt, encode_response, load_tokenizer


@dataclass
class SFTConfig:
    data: str
    """JSONL file of demonstrations: {"instruction", "response"}."""
    out: str
    """Directory for the checkpoint and metrics.jsonl."""
    model: str = "scratch:small"
    """Hugging Face id or directory, scratch:demo or scratch:small."""
    tokenizer: str | None = None
    """Hugging Face id or directory, "bpe" (trained on the data) or "arithmetic"; None: the model's own."""
    num_steps: Count = 400
    """Optimiser steps; the data are repeated in a new order as often as needed."""
    batch_size: Count = 64
    """Demonstrations per step."""
    lr: NonNegative = 2e-5
    """Peak learning rate."""
    warmup_steps: CountOrNone = 0
    """Steps over which the learning rate rises."""
    decay: Share = 0.4
    """Share of the steps, at the end, over which the learning rate falls to 0."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm."""
    max_len: Count = 1024
    """Longest sequence in tokens: responses are cut from the right."""
    max_tokens: Count = 8192
    """Packed tokens per micro-batch."""
    seed: CountOrNone = 0
    device: str = "cpu"
    dtype: Dtype = "float32"
    tensorboard: bool = False
    """Write TensorBoard event files beside metrics.jsonl."""


class SFTResult(NamedTuple):
    directory: str  # the checkpoint
    loss: float  # negative log-likelihood per response token, mean of the last tenth of the steps
    tokens_per_s: float


def train_sft(config: SFTConfig) -> SFTResult:
    """Maximise the likelihood of the responses, token-mean over each batch. Same config, same bits.

    Raises ValueError for malformed data, a number out of range and a sequence longer than max_tokens or the context.
    """
    check_ranges(config)
    torch.manual_seed(config.seed)
    order = torch.Generator().manual_seed(config.seed)
    rows = read_jsonl(config.data, Demonstration)
    tokenizer = load_tokenizer(config.tokenizer or config.model, (text for row in rows for text in row))
    prompts = [encode_prompt(tokenizer, row.instruction) for row in rows]
    sequences = [
        fit(prompt, encode_response(tokenizer, row.response), config.max_len, f"{config.data}:{i}")
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True), start=1)
    ]
    plan_microbatches(list(map(len, sequences)), max_tokens=config.max_tokens)  # over the budget is an error now
    model = load_policy(config.model, tokenizer, device=config.device, dtype=getattr(torch, config.dtype))
    check_no_leak(model)
    check_context(model, max(map(len, sequences)))
    policy = Policy(model).train()
    optimizer = AdamW(policy.parameters(), betas=(0.9, 0.95))
    log, phases = MetricsLog(config.out, tensorboard=config.tensorboard), Phases(model.device)

    num_epochs = -(-config.num_steps * config.batch_size // len(rows))
    draws = torch.cat([torch.randperm(len(rows), generator=order) for _ in range(num_epochs)]).tolist()
    num_tokens, seconds, losses = 0, 0.0, []
    for i in range(config.num_steps):
        batch = draws[i * config.batch_size : (i + 1) * config.batch_size]
        num_actions = sum(len(sequences[j]) - len(prompts[j]) for j in batch)
        with phases("update"):
            loss = torch.zeros((), device=model.device)
            lengths = [len(sequences[j]) for j in batch]
            for microbatch in plan_microbatches(lengths, max_tokens=config.max_tokens)[0]:
                chosen = sorted((batch[m] for m in microbatch), key=lambda j: len(sequences[j]))
                packed = pack([sequences[j] for j in chosen], [len(prompts[j]) for j in chosen], device=config.device)
                ones = torch.ones(len(packed.action_index), device=config.device)  # [T]
                part = policy.loss(packed, ones, token_weights=ones / num_actions, kind="reinforce").loss
                part.backward()
                loss += part.detach()
            lr = config.lr * trapezoid(i, config.num_steps, warmup=config.warmup_steps, decay=config.decay)
            grad_norm = optimizer.step(lr, config.max_grad_norm)
        phases.count("update", sum(lengths))
        loss, grad_norm = torch.stack([loss, grad_norm]).tolist()
        values = phases.report()
        log(i, {"sft/loss": loss, "sft/grad_norm": grad_norm, "sft/lr": lr, **values})
        losses.append(loss)
        num_tokens, seconds = num_tokens + sum(lengths), seconds + values["time/update_s"]
    save_checkpoint(model, tokenizer, config.out)
    last = losses[-max(1, len(losses) // 10) :]
    return SFTResult(config.out, sum(last) / len(last), num_tokens / seconds)
