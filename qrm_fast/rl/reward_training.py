"""Training on preference pairs: a Q-RM (arXiv 2505.23363), which has a Q for every response token from whole-answer
preferences alone, and an outcome reward model (ORM), read at the last token."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .. import PackedBatch, PairLoss, pairwise_q_loss
from .attention import check_packing
from .checkpoint import save_checkpoint
from .data import Instruction, Pair, Rows, fit_rows, read_rows, texts, unequal_pairs
from .lora import adapted
from .models import check_context, load_policy, load_token_model
from .optimizer import AdamW
from .ranges import Count, NonNegative, Positive, Share, check_ranges
from .run_folder import RunFolder
from .scorer import TokenScorer, VocabularyScorer
from .steps import StepOptions, take_steps, tokens_per_s
from .token_rows import microbatches, num_tokens, pack_rows
from .tokenizers import encode_prompts, encode_responses, load_stop_ids, load_tokenizer


@dataclass(kw_only=True)
class RewardOptions(StepOptions):
    """What the training of every reward model is asked."""

    data: str
    model: str = "scratch:small"
    """Hugging Face id, directory or GGUF file (a policy's, for its backbone), scratch:demo or scratch:small."""
    tokenizer: str | None = None
    """Hugging Face id, directory or GGUF file, "bpe" (trained on the data) or "arithmetic"; None: the model's own."""
    heldout: Share = 0.15
    """Share of the prompts kept for evaluation, with all their rows; 0: train on all."""


@dataclass(kw_only=True)
class PairOptions(RewardOptions):
    data: str
    """JSONL file of preference pairs: {"instruction", "chosen", "rejected"}."""
    num_epochs: Count = 1
    """Passes over the training pairs, each in a new order."""


@dataclass(kw_only=True)
class QRMConfig(PairOptions):
    kind: Literal["qrm", "qrm-vocab"] = "qrm"
    """One score per token by a head of its own, or a causal language model whose logits are the Q-values."""
    beta: Positive = 0.2
    """Scale of the gap between the mean scores of the two answers."""
    gamma: NonNegative = 2.0
    """Margin that the scaled gap has to pass."""


@dataclass(kw_only=True)
class ORMConfig(PairOptions):
    kind: Literal["orm"] = "orm"


Row = TypeVar("Row")


class TokenPair(NamedTuple):
    prompt: list[int]
    chosen: list[int]  # prompt and chosen answer
    rejected: list[int]  # prompt and rejected answer

    @property
    def sequences(self) -> list[list[int]]:
        """In the order that `pairwise_q_loss` reads."""
        return [self.chosen, self.rejected]


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


def train_q_rm(config: QRMConfig | ORMConfig) -> QRMResult:
    """Minimise softplus(gamma - beta (mean Q chosen - mean Q rejected)) over the pairs. Same config, same bits.

    The loss of an ORM is softplus(Q rejected - Q chosen) at the last tokens. Raises ValueError for malformed data, an
    empty side, a number out of range, a prompt that fills max_len, a pair longer than max_tokens, an answer longer than
    the model's context and a split that leaves a side without pairs.
    """
    check_ranges(config)
    folder = RunFolder(config)
    torch.manual_seed(config.seed)
    order = torch.Generator().manual_seed(config.seed)
    tokenizer, instructions, pairs = read_pairs(config)
    train, heldout = split(instructions, pairs, config.heldout, order)
    dtype = getattr(torch, config.dtype)
    scorer: TokenScorer | VocabularyScorer
    if config.kind == "qrm-vocab":
        model = load_policy(config.model, tokenizer, device=config.device, dtype=dtype)
        scorer = VocabularyScorer(adapted(model, config.model, config))
    else:
        model = load_token_model(config.model, tokenizer, device=config.device, dtype=dtype)
        scorer = TokenScorer(adapted(model, config.model, config), reads_action=True)
    scorer.model.config.reward_model = config.kind  # a Q-RM and an ORM have the same weights, a policy nearly so
    longest = max(len(answer) for pair in pairs for answer in pair.sequences)
    check_context(scorer.model, longest)
    check_packing(scorer.model, longest)
    # who scores with it ends texts as they were trained on
    scorer.model.config.eos_token_id = load_stop_ids(config.model, tokenizer)
    batches = shuffled_batches(train, config.num_epochs, config.batch_size, order)

    def backward(batch: list[TokenPair]) -> dict[str, Tensor]:
        loss, accuracy = torch.zeros(2, device=config.device).unbind()
        for microbatch in microbatches(batch, config.max_tokens):
            packed = pack_rows(microbatch, config.device)
            scores = pair_loss(scorer(packed), packed, config)
            share = len(microbatch) / len(batch)
            (scores.loss * share).backward()
            loss = loss + scores.loss.detach() * share
            accuracy = accuracy + scores.accuracy * share
        return {"loss": loss, "accuracy": accuracy}

    with folder:
        optimizer = AdamW(scorer.train().parameters())
        name = "orm" if config.kind == "orm" else "qrm"
        log = take_steps(config, folder, name, optimizer, batches, backward, num_tokens)
        speed = tokens_per_s(log)
        save_checkpoint(scorer.model, tokenizer, config.out)
        of_train = evaluate_pairs(scorer, train, config)
        on_heldout = evaluate_pairs(scorer, heldout, config) if heldout else None
        if on_heldout is not None:
            log(len(batches), {f"{name}/heldout_{key}": value for key, value in on_heldout._asdict().items()})
    return QRMResult(config.out, of_train, on_heldout, len(train), len(heldout), speed)


def pair_loss(q: Tensor, packed: PackedBatch, config: QRMConfig | ORMConfig) -> PairLoss:
    """Of packed pairs, whose actions have the scores `q` [T]."""
    cu_seqlens = packed.action_cu_seqlens
    if isinstance(config, QRMConfig):
        return pairwise_q_loss(q, cu_seqlens, beta=config.beta, gamma=config.gamma)
    last = torch.zeros_like(q, dtype=torch.bool).index_fill(0, cu_seqlens[1:].long() - 1, True)
    return pairwise_q_loss(q, cu_seqlens, mask=last, beta=1.0, gamma=0.0)


@torch.no_grad()
def evaluate_pairs(
    scorer: TokenScorer | VocabularyScorer, pairs: list[TokenPair], config: QRMConfig | ORMConfig
) -> PairMetrics:
    """Loss and accuracies of a reward model over tokenised pairs."""
    sums = torch.zeros(4, dtype=torch.float64, device=config.device)
    for microbatch in microbatches(pairs, config.max_tokens):
        packed = pack_rows(microbatch, config.device)
        q = scorer(packed)
        loss, margin, accuracy = pair_loss(q, packed, config)
        forks = torch.tensor([first_difference(pair) for pair in microbatch], device=q.device)
        chosen, rejected = (packed.action_cu_seqlens[side:-1:2] + forks for side in (0, 1))
        action_accuracy = (q[chosen] > q[rejected]).double().mean()
        sums += len(microbatch) * torch.stack([loss, accuracy, action_accuracy, margin.mean()]).double()
    return PairMetrics(*(sums / len(pairs)).tolist())


def first_difference(pair: TokenPair) -> int:
    """Place of the first token, after the prompt, in which the answers differ."""
    answers = zip(pair.chosen[len(pair.prompt) :], pair.rejected[len(pair.prompt) :], strict=False)
    return next((t for t, (a, b) in enumerate(answers) if a != b), 0)


def read_pairs(config: PairOptions) -> tuple[PreTrainedTokenizerBase, list[Instruction], list[TokenPair]]:
    """The tokenizer, and the pairs of `config.data` whose sides differ, with their prompts. Raises for malformed data,
    an empty side and a pair over the token budget."""

    def check(pair: Pair) -> None:
        for side in ("chosen", "rejected"):
            if not getattr(pair, side).strip():
                raise ValueError(f"expected an answer in {side!r}, got an empty text")

    rows = read_rows(config.data, Pair, check=check)
    tokenizer = load_tokenizer(config.tokenizer or config.model, texts(rows))
    pairs = _token_pairs(rows, tokenizer, config, load_stop_ids(config.model, tokenizer)[0])
    different = unequal_pairs(pairs, rows.places)
    kept = [pairs[i] for i in different]
    microbatches(kept, config.max_tokens)  # a pair over the budget is an error now, not in the middle of training
    return tokenizer, [rows[i].instruction for i in different], kept


def shuffled_batches(rows: list[Row], num_epochs: int, batch_size: int, order: torch.Generator) -> list[list[Row]]:
    """The batches of some passes over the rows, each in a new order."""
    batches = []
    for _ in range(num_epochs):
        shuffled = [rows[j] for j in torch.randperm(len(rows), generator=order).tolist()]
        batches += [shuffled[j : j + batch_size] for j in range(0, len(rows), batch_size)]
    return batches


def _token_pairs(
    rows: Rows[Pair], tokenizer: PreTrainedTokenizerBase, config: PairOptions, end: int
) -> list[TokenPair]:
    prompts = encode_prompts(tokenizer, rows)
    sides = (
        fit_rows(prompts, encode_responses(tokenizer, rows, field, end), config.max_len, rows.places)
        for field in ("chosen", "rejected")
    )
    return [TokenPair(*pair) for pair in zip(prompts, *sides, strict=True)]


def split(
    instructions: list[Instruction], rows: list[Row], heldout: float, order: torch.Generator
) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out: those of a share `heldout` of the prompts.

    Raises ValueError where a side would have none.
    """
    prompts = list(dict.fromkeys(instructions))
    num_heldout = round(heldout * len(prompts))
    kept = {prompts[i] for i in torch.randperm(len(prompts), generator=order)[:num_heldout].tolist()}
    train = [row for prompt, row in zip(instructions, rows, strict=True) if prompt not in kept]
    others = [row for prompt, row in zip(instructions, rows, strict=True) if prompt in kept]
    if not train or (heldout and not others):
        raise ValueError(
            f"heldout must leave rows to train on and to evaluate, got {heldout} of {len(prompts)} prompts"
        )
    return train, others
