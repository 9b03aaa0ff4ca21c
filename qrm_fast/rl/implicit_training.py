"""Training an implicit reward model: a policy whose log-ratio to its start is the reward, from preference pairs (DPO,
arXiv 2305.18290) or from judged answers (arXiv 2412.01981)."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .. import plan_microbatches
from .attention import check_packing
from .checkpoint import save_checkpoint
from .data import Instruction, Judged, fit_rows, read_rows, texts
from .lora import adapted
from .models import check_context, load_policy, num_token_ids
from .optimizer import AdamW
from .policy import Policy
from .ranges import Count, NonNegative, Positive, check_ranges
from .reward_training import PairOptions, RewardOptions, read_pairs, shuffled_batches, split
from .run_folder import RunFolder
from .steps import take_steps, tokens_per_s
from .token_rows import microbatches, num_tokens, pack_rows
from .tokenizers import encode_prompts, encode_responses, lasting, load_stop_ids, load_tokenizer


@dataclass(kw_only=True)
class DPOConfig(PairOptions):
    kind: Literal["dpo"] = "dpo"
    model: str = field()  # which has no default, unlike that of `RewardOptions`
    """Hugging Face id, directory or GGUF file: the policy to start from, which is the reference too."""
    beta: Positive = 0.1
    """Scale of the log-ratio."""
    lr: NonNegative = 1e-6
    """Peak learning rate."""


@dataclass(kw_only=True)
class ImplicitConfig(RewardOptions):
    kind: Literal["implicit"] = "implicit"
    data: str
    """JSONL file of judged answers: {"instruction", "response", "label"}, label true where it is right."""
    model: str = field()  # which has no default, unlike that of `RewardOptions`
    """Hugging Face id, directory or GGUF file: the policy to start from, which is the reference too."""
    beta: Positive = 0.05
    """Scale of the log-ratio."""
    num_epochs: Count = 1
    """Passes over the training answers, each in a new order."""
    lr: NonNegative = 1e-6
    """Peak learning rate."""


class Item(NamedTuple):
    """A pair, the chosen answer first, or one answer that was judged."""

    prompt: list[int]
    sequences: list[list[int]]  # of each answer, the prompt and the answer
    label: float  # 1 for a pair
    reference: Tensor  # [T] float32, log-probabilities of the actions of all answers at the start, on the CPU


class ImplicitMetrics(NamedTuple):
    loss: float
    accuracy: (
        float  # share of the pairs whose chosen answer has the larger reward, of answers with reward > 0 iff right
    )
    margin: float  # mean reward of the chosen answer above the rejected one's; of right answers and minus that of wrong


class ImplicitResult(NamedTuple):
    directory: str  # the checkpoint
    train: ImplicitMetrics
    heldout: ImplicitMetrics | None  # None where nothing is held out
    num_train: int
    num_heldout: int
    tokens_per_s: float


def train_implicit(config: DPOConfig | ImplicitConfig) -> ImplicitResult:
    """Fit r(answer) = beta sum_t (log pi - log pi_start)(a_t) to preferences or to judgements. Same config, same bits.

    DPO minimises softplus(r rejected - r chosen), an implicit reward model the cross-entropy of sigmoid(r). The
    reference is the model at the start: its log-probabilities are taken once, packed, and kept. The checkpoint is a
    causal language model whose configuration names the reference and beta. Raises ValueError as `train_q_rm` and for a
    scratch model, which nobody could load again as a reference.
    """
    check_ranges(config)
    if config.model.startswith("scratch:"):
        raise ValueError(f"model must be a checkpoint, which stays as the reference, got {config.model}")
    folder = RunFolder(config)
    torch.manual_seed(config.seed)
    order = torch.Generator().manual_seed(config.seed)
    tokenizer, instructions, items = _read(config)
    longest = max(len(answer) for item in items for answer in item.sequences)
    model = load_policy(config.model, tokenizer, device=config.device, dtype=getattr(torch, config.dtype))
    model = adapted(model, config.model, config)
    check_context(model, longest)
    check_packing(model, longest)
    policy = Policy(model, num_ids=num_token_ids(tokenizer))
    items = _with_reference(policy, items, config)
    train, heldout = split(instructions, items, config.heldout, order)
    batches = shuffled_batches(train, config.num_epochs, config.batch_size, order)

    def backward(batch: list[Item]) -> dict[str, Tensor]:
        sums = torch.zeros(3, device=config.device)
        for microbatch in microbatches(batch, config.max_tokens):
            losses, right, margins = _judge(policy, microbatch, config)
            (losses.sum() / len(batch)).backward()
            sums += torch.stack([losses.detach().sum(), right.sum(), margins.detach().sum()]) / len(batch)
        return {"loss": sums[0], "accuracy": sums[1], "margin": sums[2]}

    with folder:
        optimizer = AdamW(policy.train().parameters())
        log = take_steps(config, folder, config.kind, optimizer, batches, backward, num_tokens)
        speed = tokens_per_s(log)
        model.config.reward_model, model.config.implicit_beta = config.kind, config.beta
        model.config.reference_model = lasting(config.model)
        save_checkpoint(model, tokenizer, config.out)
        on_heldout = _evaluate(policy, heldout, config) if heldout else None
        if on_heldout is not None:
            names = on_heldout._asdict().items()
            log(len(batches), {f"{config.kind}/heldout_{name}": value for name, value in names})
        on_train = _evaluate(policy, train, config)
    return ImplicitResult(config.out, on_train, on_heldout, len(train), len(heldout), speed)


def _read(
    config: DPOConfig | ImplicitConfig,
) -> tuple[PreTrainedTokenizerBase, list[Instruction], list[Item]]:
    """The tokenizer, prompts, and items that lack their reference."""
    nothing = torch.empty(0)
    if isinstance(config, DPOConfig):
        tokenizer, instructions, pairs = read_pairs(config)
        return tokenizer, instructions, [Item(x.prompt, [x.chosen, x.rejected], 1.0, nothing) for x in pairs]
    rows = read_rows(config.data, Judged)
    tokenizer = load_tokenizer(config.tokenizer or config.model, texts(rows))
    prompts = encode_prompts(tokenizer, rows)
    responses = encode_responses(tokenizer, rows, "response", load_stop_ids(config.model, tokenizer)[0])
    answers = fit_rows(prompts, responses, config.max_len, rows.places)
    items = [
        Item(prompt, [answer], float(row.label), nothing)
        for prompt, answer, row in zip(prompts, answers, rows, strict=True)
    ]
    microbatches(items, config.max_tokens)  # one over the budget is an error now, not in the middle of training
    return tokenizer, [row.instruction for row in rows], items


@torch.no_grad()
def _with_reference(policy: Policy, items: list[Item], config: DPOConfig | ImplicitConfig) -> list[Item]:
    """Every item with the log-probabilities that `policy`, which has not moved yet, gives its answers."""
    referenced = list(items)
    lengths = [num_tokens([item]) for item in items]
    for indices in plan_microbatches(lengths, max_tokens=config.max_tokens)[0]:
        chosen = [items[i] for i in indices]
        logprobs = policy(pack_rows(chosen, config.device)).logprobs.cpu()
        num_actions = [lengths[i] - len(items[i].prompt) * len(items[i].sequences) for i in indices]
        for i, part in zip(indices, logprobs.split(num_actions), strict=True):
            referenced[i] = items[i]._replace(reference=part)
    return referenced


def _judge(policy: Policy, items: list[Item], config: DPOConfig | ImplicitConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, whether it is right and margin of every item, [I] each."""
    packed = pack_rows(items, config.device)
    reference = torch.cat([item.reference for item in items]).to(config.device)
    log_ratio = policy(packed).logprobs - reference  # [T]
    lengths = packed.action_cu_seqlens.diff().long()
    rewards = config.beta * torch.segment_reduce(log_ratio, "sum", lengths=lengths)  # [S]
    if isinstance(config, DPOConfig):
        margins = rewards[0::2] - rewards[1::2]
        return F.softplus(-margins), (margins > 0).float(), margins
    labels = torch.tensor([item.label for item in items], device=config.device)
    losses = F.binary_cross_entropy_with_logits(rewards, labels, reduction="none")
    return losses, ((rewards > 0) == (labels > 0)).float(), rewards * (2 * labels - 1)


@torch.no_grad()
def _evaluate(policy: Policy, items: list[Item], config: DPOConfig | ImplicitConfig) -> ImplicitMetrics:
    parts = [torch.stack(_judge(policy, part, config)) for part in microbatches(items, config.max_tokens)]
    return ImplicitMetrics(*torch.cat(parts, 1).double().mean(1).tolist())
