"""Supervised fine-tuning on demonstrations: the policy that reinforcement learning starts from."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import pack, plan_microbatches
from .attention import check_packing
from .checkpoint import save_checkpoint
from .data import Demonstration, fit_rows, read_rows, texts
from .lora import adapted
from .models import check_context, load_policy, num_token_ids
from .optimizer import AdamW
from .policy import Policy
from .ranges import Count, NonNegative, Share, check_ranges
from .run_folder import RunFolder
from .steps import StepOptions, take_steps, tokens_per_s
from .tokenizers import encode_prompts, encode_responses, load_stop_ids, load_tokenizer


@dataclass(kw_only=True)
class SFTConfig(StepOptions):
    data: str
    """JSONL file of demonstrations: {"instruction", "response"}."""
    model: str = "scratch:small"
    """Hugging Face id, directory or GGUF file, scratch:demo or scratch:small."""
    tokenizer: str | None = None
    """Hugging Face id, directory or GGUF file, "bpe" (trained on the data) or "arithmetic"; None: the model's own."""
    num_steps: Count = 400
    """Optimiser steps; the data are repeated in a new order as often as needed."""
    lr: NonNegative = 2e-5
    """Peak learning rate."""
    decay: Share = 0.4
    """Share of the steps, at the end, over which the learning rate falls to 0."""


class SFTResult(NamedTuple):
    directory: str  # the checkpoint
    loss: float  # negative log-likelihood per response token, mean of the last tenth of the steps
    tokens_per_s: float


def train_sft(config: SFTConfig) -> SFTResult:
    """Maximise the likelihood of the responses, token-mean over each batch. Same config, same bits.

    Raises ValueError for malformed data, a number out of range and a sequence longer than max_tokens or the context,
    FloatingPointError before a step that is not finite, `Stopped` after the step in which a signal came.
    """
    check_ranges(config)
    folder = RunFolder(config)
    torch.manual_seed(config.seed)
    order = torch.Generator().manual_seed(config.seed)
    rows = read_rows(config.data, Demonstration)
    tokenizer = load_tokenizer(config.tokenizer or config.model, texts(rows))
    end_id = load_stop_ids(config.model, tokenizer)[0]
    prompts = encode_prompts(tokenizer, rows)
    responses = encode_responses(tokenizer, rows, "response", end_id)
    sequences = fit_rows(prompts, responses, config.max_len, rows.places)
    plan_microbatches(list(map(len, sequences)), max_tokens=config.max_tokens)  # over the budget is an error now
    model = load_policy(config.model, tokenizer, device=config.device, dtype=getattr(torch, config.dtype))
    model = adapted(model, config.model, config)
    longest = max(map(len, sequences))
    check_context(model, longest)
    check_packing(model, longest)
    policy = Policy(model, num_ids=num_token_ids(tokenizer)).train()
    optimizer = AdamW(policy.parameters(), betas=(0.9, 0.95))

    num_epochs = -(-config.num_steps * config.batch_size // len(rows))
    draws = torch.cat([torch.randperm(len(rows), generator=order) for _ in range(num_epochs)]).tolist()
    batches = [draws[i * config.batch_size : (i + 1) * config.batch_size] for i in range(config.num_steps)]

    def num_tokens(batch: list[int]) -> int:
        return sum(len(sequences[j]) for j in batch)

    def backward(batch: list[int]) -> dict[str, Tensor]:
        """Gradients of the negative log-likelihood per response token: A = 1 for every one."""
        num_actions = num_tokens(batch) - sum(len(prompts[j]) for j in batch)
        loss = torch.zeros((), device=config.device)
        for microbatch in plan_microbatches([len(sequences[j]) for j in batch], max_tokens=config.max_tokens)[0]:
            chosen = sorted((batch[m] for m in microbatch), key=lambda j: len(sequences[j]))
            packed = pack([sequences[j] for j in chosen], [len(prompts[j]) for j in chosen], device=config.device)
            ones = torch.ones(len(packed.action_index), device=config.device)  # [T]
            part = policy.loss(packed, ones, token_weights=ones / num_actions, kind="reinforce").loss
            part.backward()
            loss += part.detach()
        return {"loss": loss}

    with folder:
        log = take_steps(config, folder, "sft", optimizer, batches, backward, num_tokens)
        save_checkpoint(model, tokenizer, config.out)
    last = [row["sft/loss"] for row in log.rows[-max(1, len(log.rows) // 10) :]]
    return SFTResult(config.out, sum(last) / len(last), tokens_per_s(log))
