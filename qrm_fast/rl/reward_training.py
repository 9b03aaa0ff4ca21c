"""Training a Q-RM on preference pairs (arXiv 2505.23363): a scalar Q for every response token, from whole-answer
preferences alone."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .. import PackedBatch, pack, pairwise_q_loss, plan_microbatches, unpack
from .attention import check_packing
from .checkpoint import save_checkpoint
from .data import Instruction, Pair, Rows, fit_rows, read_rows, texts, unequal_pairs
from .models import check_context, load_token_model
from .optimizer import AdamW
from .ranges import Count, NonNegative, Positive, Share, check_ranges
from .run_folder import RunFolder
from .scorer import TokenScorer
from .steps import StepOptions, take_steps, tokens_per_s
from .tokenizers import encode_prompts, encode_responses, load_stop_ids, load_tokenizer


@dataclass(kw_only=True)
class QRMConfig(StepOptions):
    data: str
    """JSONL file of preference pairs: {"instruction", "chosen", "rejected"}."""
    model: str = "scratch:small"
    """Hugging Face id or directory (a policy's, for its backbone), scratch:demo or scratch:small."""
    tokenizer: str | None = None
    """Hugging Face id or directory, "bpe" (trained on the data) or "arithmetic"; None: the model's own."""
    beta: Positive = 0.2
    """Scale of the gap between the mean scores of the two answers."""
    gamma: NonNegative = 2.0
    """Margin that the scaled gap has to pass."""
    heldout: Share = 0.15
    """Share of the prompts kept for evaluation, with all their pairs; 0: train on all."""
    num_epochs: Count = 1
    """Passes over the training pairs, each in a new order."""


class TokenPair(NamedTuple):
    prompt: list[int]
    chosen: list[int]  # prompt and chosen answer
    rejected: list[int]  # prompt and rejected answer


class PairMetrics(NamedTuple):
    loss: float
    accuracy: float  # share of pairs whose chosen answer has the larger mean Q
    action_accuracy: float  # the same at the first token where the two answers part: same prefix, two actions
    margin: float  # mean Q of the chosen answer above the rejected one's, averaged over pairs


class QRMResult(NamedTuple):
    directory: str  # the checkpoint
    train: PairMetrics  # over the training pairs, after training
    heldout: PairMetrics | None  # None where no pair is held out
    num_train: int
    num_heldout: int
    tokens_per_s: float


def train_q_rm(config: QRMConfig) -> QRMResult:
    """Minimise softplus(gamma - beta (mean Q chosen - mean Q rejected)) over the pairs. Same config, same bits.

    Raises ValueError for malformed data, a number out of range, a prompt that fills max_len, a pair longer than
    max_tokens, an answer longer than the model's context and a split that leaves a side without pairs.
    """
    check_ranges(config)
    folder = RunFolder(config)
    torch.manual_seed(config.seed)
    order = torch.Generator().manual_seed(config.seed)
    rows = read_rows(config.data, Pair)
    tokenizer = load_tokenizer(config.tokenizer or config.model, texts(rows))
    stop_ids = load_stop_ids(config.model, tokenizer)
    pairs = _token_pairs(rows, tokenizer, config, stop_ids[0])
    different = unequal_pairs(pairs, rows.places)
    instructions, pairs = [rows[i].instruction for i in different], [pairs[i] for i in different]
    _microbatches(pairs, config.max_tokens)  # a pair over the budget is an error now, not in the middle of training
    train, heldout = _split(instructions, pairs, config, order)
    model = load_token_model(config.model, tokenizer, device=config.device, dtype=getattr(torch, config.dtype))
    longest = max(len(answer) for pair in pairs for answer in (pair.chosen, pair.rejected))
    check_context(model, longest)
    check_packing(model, longest)
    model.config.eos_token_id = stop_ids  # who scores with it ends texts as they were trained on
    q_rm = TokenScorer(model, reads_action=True).train()

    batches = []
    for _ in range(config.num_epochs):
        shuffled = [train[j] for j in torch.randperm(len(train), generator=order).tolist()]
        batches += [shuffled[j : j + config.batch_size] for j in range(0, len(train), config.batch_size)]

    def backward(batch: list[TokenPair]) -> dict[str, Tensor]:
        loss, accuracy = torch.zeros(2, device=config.device).unbind()
        for microbatch in _microbatches(batch, config.max_tokens):
            packed = _pack_pairs(microbatch, config.device)
            scores = pairwise_q_loss(q_rm(packed), packed.action_cu_seqlens, beta=config.beta, gamma=config.gamma)
            share = len(microbatch) / len(batch)
            (scores.loss * share).backward()
            loss = loss + scores.loss.detach() * share
            accuracy = accuracy + scores.accuracy * share
        return {"loss": loss, "accuracy": accuracy}

    with folder:
        optimizer = AdamW(q_rm.parameters())
        log = take_steps(
            config, folder, "qrm", q_rm, optimizer, batches, backward, lambda batch: sum(map(_num_tokens, batch))
        )
        speed = tokens_per_s(log)
        save_checkpoint(model, tokenizer, config.out)
        on_heldout = evaluate_pairs(q_rm, heldout, config) if heldout else None
        result = QRMResult(config.out, evaluate_pairs(q_rm, train, config), on_heldout, len(train), len(heldout), speed)
        if on_heldout is not None:
            log(len(batches), {f"qrm/heldout_{name}": value for name, value in on_heldout._asdict().items()})
    return result


@torch.no_grad()
def evaluate_pairs(q_rm: TokenScorer, pairs: list[TokenPair], config: QRMConfig) -> PairMetrics:
    """Loss and accuracies of a Q-RM over tokenised pairs."""
    sums = torch.zeros(4, dtype=torch.float64, device=config.device)
    for microbatch in _microbatches(pairs, config.max_tokens):
        packed = _pack_pairs(microbatch, config.device)
        q = q_rm(packed)
        scores = pairwise_q_loss(q, packed.action_cu_seqlens, beta=config.beta, gamma=config.gamma)
        per_answer = unpack(q, packed.action_cu_seqlens)
        num_right = q.new_zeros((), dtype=torch.float64)
        for pair, q_chosen, q_rejected in zip(microbatch, per_answer[0::2], per_answer[1::2], strict=True):
            answers = zip(pair.chosen[len(pair.prompt) :], pair.rejected[len(pair.prompt) :], strict=False)
            fork = next((t for t, (a, b) in enumerate(answers) if a != b), 0)
            num_right += q_chosen[fork] > q_rejected[fork]
        sums += torch.stack(
            [
                scores.loss.double() * len(microbatch),
                scores.accuracy.double() * len(microbatch),
                num_right,
                scores.margin.double().sum(),
            ]
        )
    return PairMetrics(*(sums / len(pairs)).tolist())


def _token_pairs(rows: Rows[Pair], tokenizer: PreTrainedTokenizerBase, config: QRMConfig, end: int) -> list[TokenPair]:
    prompts = encode_prompts(tokenizer, rows)
    sides = (
        fit_rows(prompts, encode_responses(tokenizer, rows, field, end), config.max_len, rows.places)
        for field in ("chosen", "rejected")
    )
    return [TokenPair(*pair) for pair in zip(prompts, *sides, strict=True)]


def _split(
    instructions: list[Instruction], pairs: list[TokenPair], config: QRMConfig, order: torch.Generator
) -> tuple[list[TokenPair], list[TokenPair]]:
    prompts = list(dict.fromkeys(instructions))
    num_heldout = round(config.heldout * len(prompts))
    kept = {prompts[i] for i in torch.randperm(len(prompts), generator=order)[:num_heldout].tolist()}
    train = [pair for prompt, pair in zip(instructions, pairs, strict=True) if prompt not in kept]
    heldout = [pair for prompt, pair in zip(instructions, pairs, strict=True) if prompt in kept]
    if not train or (config.heldout and not heldout):
        raise ValueError(
            f"heldout must leave pairs to train on and to evaluate, got {config.heldout} of {len(prompts)} prompts"
        )
    return train, heldout


def _num_tokens(pair: TokenPair) -> int:
    return len(pair.chosen) + len(pair.rejected)


def _microbatches(pairs: list[TokenPair], max_tokens: int) -> list[list[TokenPair]]:
    plan = plan_microbatches([_num_tokens(pair) for pair in pairs], max_tokens=max_tokens)[0]
    return [sorted((pairs[i] for i in bin), key=lambda pair: (len(pair.chosen), len(pair.rejected))) for bin in plan]


def _pack_pairs(pairs: list[TokenPair], device: str) -> PackedBatch:
    """Chosen and rejected answers in turn, as `pairwise_q_loss` reads them."""
    sequences = [answer for pair in pairs for answer in (pair.chosen, pair.rejected)]
    return pack(sequences, [len(pair.prompt) for pair in pairs for _ in range(2)], device=device)
