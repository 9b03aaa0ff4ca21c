"""Training a process reward model (PURE, arXiv 2504.15275): right or wrong, at the end of every step of a solution."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .. import PackedBatch
from .attention import backbone, check_packing
from .checkpoint import save_checkpoint
from .control_tokens import text_ids
from .data import Rows, Solution, at, fit_rows, read_rows, texts
from .lora import adapted
from .models import check_context, load_token_model
from .optimizer import AdamW
from .prm import SEPARATOR, separator_id
from .ranges import Count, CountOrNone, NonNegative, check_ranges
from .reward_training import RewardOptions, shuffled_batches, split
from .run_folder import RunFolder
from .scorer import StepScorer
from .steps import learning_rates, take_steps, tokens_per_s
from .token_rows import microbatches, num_tokens, pack_rows
from .tokenizers import encode_prompts, load_stop_ids, load_tokenizer


@dataclass(kw_only=True)
class PRMConfig(RewardOptions):
    kind: Literal["prm"] = "prm"
    data: str
    """JSONL file of solutions with a label for each step: {"instruction", "steps", "labels"}."""
    separator: str = SEPARATOR
    """The text, one token, that closes every step in the model's input, and at which it is read."""
    num_head_epochs: CountOrNone = 3
    """Passes over the data in which the head alone is trained, before the passes that train all."""
    head_lr: NonNegative = 1e-4
    """Peak learning rate of those."""
    num_epochs: CountOrNone = 1
    """Passes over the data in which all weights are trained."""
    lr: NonNegative = 1e-6
    """Peak learning rate of those."""
    batch_size: Count = 128
    """Solutions per optimiser step."""


class TokenSolution(NamedTuple):
    prompt: list[int]
    tokens: list[int]  # the prompt, and every step with the separator behind it
    ends: list[int]  # of every step, the place of its separator among the tokens after the prompt
    labels: list[bool]  # of every step

    @property
    def sequences(self) -> list[list[int]]:
        return [self.tokens]


class StepMetrics(NamedTuple):
    loss: float  # cross-entropy per step
    accuracy: float  # share of the steps that are judged as their labels say
    wrong_found: float  # of the wrong steps, NaN where there is none
    right_kept: float  # of the right steps, NaN where there is none
    first_error: float  # share of the solutions whose first wrong step, or that there is none, is found
    calibration_error: float  # mean distance of P(right) to the share of right steps, over ten bins of P(right)


class Bin(NamedTuple):
    """The steps with P(right) in one tenth of [0, 1]."""

    predicted: float  # mean P(right)
    right: float  # share that is
    num_steps: int


class PRMResult(NamedTuple):
    directory: str  # the checkpoint
    train: StepMetrics  # over the training solutions, after training
    heldout: StepMetrics | None  # None where no solution is held out
    bins: list[Bin]  # of the held out steps, else of those trained on
    num_train: int
    num_heldout: int
    tokens_per_s: float


class Batch(NamedTuple):
    solutions: list[TokenSolution]
    head_alone: bool


def train_prm(config: PRMConfig) -> PRMResult:
    """Minimise the mean cross-entropy of step labels: of the head, then of all weights. Same config, same bits.

    The checkpoint is an AutoModelForTokenClassification with two labels, 1 is "right". Raises ValueError for malformed
    data, a number out of range, a separator that is not one token, a prompt that fills max_len, a solution longer than
    max_tokens or than the model's context, and a split that leaves a side without solutions; FloatingPointError before
    a step that is not finite.
    """
    check_ranges(config)
    if not config.num_head_epochs and not config.num_epochs:
        raise ValueError("num_head_epochs and num_epochs must not both be 0, got no pass over the data")
    folder = RunFolder(config)
    torch.manual_seed(config.seed)
    order = torch.Generator().manual_seed(config.seed)
    rows = read_rows(config.data, Solution)
    tokenizer = load_tokenizer(config.tokenizer or config.model, texts(rows))
    solutions = _token_solutions(rows, tokenizer, config)
    whole = [i for i, solution in enumerate(solutions) if solution.ends]
    if len(whole) < len(solutions):
        place = rows.places[next(i for i, solution in enumerate(solutions) if not solution.ends)]
        counts = f"{len(solutions) - len(whole)} of {len(solutions)} solutions have no whole step in max_len tokens"
        if not whole:
            raise ValueError(f"{place}: expected solutions with a step, but {counts}")
        warnings.warn(f"{counts} and are left out, the first is {place}", stacklevel=2)
    microbatches(solutions, config.max_tokens)  # one over the budget is an error now, not in the middle of training
    instructions = [rows[i].instruction for i in whole]
    train, heldout = split(instructions, [solutions[i] for i in whole], config.heldout, order)
    dtype = getattr(torch, config.dtype)
    model = load_token_model(config.model, tokenizer, num_labels=2, device=config.device, dtype=dtype)
    model = adapted(model, config.model, config)
    longest = max(len(solution.tokens) for solution in solutions)
    check_context(model, longest)
    check_packing(model, longest)
    model.config.step_separator = config.separator  # who scores with it closes steps as they were in training
    model.config.eos_token_id = load_stop_ids(config.model, tokenizer)
    prm = StepScorer(model).train()
    below = [p for p in backbone(model).parameters() if p.requires_grad]

    batches: list[Batch] = []
    lrs: list[float] = []
    for head_alone, num_epochs, lr in (
        (True, config.num_head_epochs, config.head_lr),
        (False, config.num_epochs, config.lr),
    ):
        stage = [
            Batch(solutions, head_alone) for solutions in shuffled_batches(train, num_epochs, config.batch_size, order)
        ]
        batches += stage
        lrs += learning_rates(config, lr, len(stage))

    def backward(batch: Batch) -> dict[str, Tensor]:
        for p in below:
            p.requires_grad_(not batch.head_alone)
        num_steps = sum(len(solution.ends) for solution in batch.solutions)
        loss, num_right = torch.zeros(2, device=config.device).unbind()
        for microbatch in microbatches(batch.solutions, config.max_tokens):
            packed, step_ends, labels = _pack(microbatch, config.device)
            logits = prm(packed, step_ends)
            part = F.cross_entropy(logits, labels, reduction="sum") / num_steps
            part.backward()
            loss = loss + part.detach()
            num_right = num_right + (logits.detach().argmax(-1) == labels).sum()
        return {"loss": loss, "accuracy": num_right / num_steps}

    with folder:
        optimizer = AdamW(prm.parameters(), betas=(0.9, 0.95))
        log = take_steps(
            config,
            folder,
            "prm",
            optimizer,
            batches,
            backward,
            lambda batch: num_tokens(batch.solutions),
            lrs,
        )
        speed = tokens_per_s(log)
        save_checkpoint(model, tokenizer, config.out)
        of_train = evaluate_steps(prm, train, config)
        of_heldout = evaluate_steps(prm, heldout, config) if heldout else None
        if of_heldout is not None:
            log(len(batches), {f"prm/heldout_{name}": value for name, value in of_heldout[0]._asdict().items()})
    metrics, bins = of_heldout or of_train
    return PRMResult(
        directory=config.out,
        train=of_train[0],
        heldout=metrics if heldout else None,
        bins=bins,
        num_train=len(train),
        num_heldout=len(heldout),
        tokens_per_s=speed,
    )


@torch.no_grad()
def evaluate_steps(prm: StepScorer, solutions: list[TokenSolution], config: PRMConfig) -> tuple[StepMetrics, list[Bin]]:
    """Loss, accuracies and calibration of a PRM over tokenised solutions."""
    p_right, right, found = [], [], []
    for microbatch in microbatches(solutions, config.max_tokens):
        packed, step_ends, labels = _pack(microbatch, config.device)
        p = prm(packed, step_ends).double().softmax(-1)[:, 1].cpu()
        p_right.append(p)
        right.append(labels.cpu())
        lengths = [len(solution.ends) for solution in microbatch]
        for judged, solution in zip(p.split(lengths), microbatch, strict=True):
            found.append(_first_wrong((judged > 0.5).tolist()) == _first_wrong(solution.labels))
    p, label = torch.cat(p_right), torch.cat(right).bool()
    judged = (p > 0.5) == label
    bins = []
    for number in range(10):
        inside = (p * 10).long().clamp(max=9) == number
        if inside.any():
            bins.append(Bin(p[inside].mean().item(), label[inside].double().mean().item(), int(inside.sum())))
    metrics = StepMetrics(
        loss=F.binary_cross_entropy(p, label.double()).item(),
        accuracy=judged.double().mean().item(),
        wrong_found=judged[~label].double().mean().item(),
        right_kept=judged[label].double().mean().item(),
        first_error=sum(found) / len(found),
        calibration_error=sum(bin.num_steps * abs(bin.predicted - bin.right) for bin in bins) / len(p),
    )
    return metrics, bins


def _first_wrong(right: Sequence[bool]) -> int | None:
    return next((i for i, x in enumerate(right) if not x), None)


def _token_solutions(
    rows: Rows[Solution], tokenizer: PreTrainedTokenizerBase, config: PRMConfig
) -> list[TokenSolution]:
    """Steps are tokenised one by one, each with the separator behind it; what passes max_len is cut, and said."""
    separator = separator_id(tokenizer, config.separator)
    prompts = encode_prompts(tokenizer, rows)
    answers, ends_of = [], []
    for row, place in zip(rows, rows.places, strict=True):
        with at(place):
            steps = [[*text_ids(tokenizer, step), separator] for step in row.steps]
        answers.append([token for step in steps for token in step])
        ends_of.append([n - 1 for n in accumulate(map(len, steps))])
    solutions = []
    sequences = fit_rows(prompts, answers, config.max_len, rows.places)
    for row, prompt, tokens, ends in zip(rows, prompts, sequences, ends_of, strict=True):
        ends = [end for end in ends if len(prompt) + end < len(tokens)]
        solutions.append(TokenSolution(prompt, tokens, ends, list(row.labels[: len(ends)])))
    return solutions


def _pack(solutions: list[TokenSolution], device: str) -> tuple[PackedBatch, Tensor, Tensor]:
    """Packed solutions, the actions that close a step [K], and the labels of the steps [K] int64."""
    packed = pack_rows(solutions, device)
    starts = packed.action_cu_seqlens.tolist()
    ends = [start + end for start, s in zip(starts, solutions, strict=False) for end in s.ends]
    labels = [label for s in solutions for label in s.labels]
    return packed, torch.tensor(ends, device=device), torch.tensor(labels, device=device).long()
