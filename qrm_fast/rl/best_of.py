"""Best of N: which of the answers to a prompt a reward model would choose, and how often that one is right."""

import math
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .. import pack, plan_microbatches, prm_rewards, unpack
from .attention import check_packing, shares_prompts
from .config import Config, check_budget, token_budget
from .data import Example, Rows
from .models import check_context, load_prm, load_q_rm
from .prm import ends_a_step, find_steps, separator_id, separator_of
from .rewards import verified
from .rollout import Engine
from .scorer import StepScorer, TokenScorer
from .token_rows import sharing_units
from .tokenizers import check_same_vocabulary, encode_prompts, load_tokenizer

Rerank = Literal["qrm", "prm", "orm", "verifier"]
Aggregation = Literal["mean", "min", "last", "product", "soft-min"]
DEFAULTS: dict[str, Aggregation] = {"qrm": "mean", "prm": "soft-min", "orm": "last", "verifier": "last"}


class BestOf(NamedTuple):
    num_answers: int  # k, to each prompt
    accuracy: float  # share of prompts where the answer of the highest score among k is right
    some_right: float  # share of prompts where one of k is right: what no choice can pass
    num_tokens: float  # sampled for a prompt


class EarlyReject(NamedTuple):
    accuracy: float  # share of prompts where the answer of the highest score among those kept is right
    num_tokens: float  # sampled for a prompt, of those dropped only the first ones
    saved: float  # share of the tokens that all answers have


class Judge:
    """Scores whole answers by a reward model: of tokens (Q-RM, ORM) or of steps (PRM)."""

    def __init__(
        self,
        rerank: Rerank,
        reward_model: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        aggregation: Aggregation,
        longest: int,
        config: Config,
    ) -> None:
        """Raises ValueError for a reward model of another kind or vocabulary, `longest` above max_tokens or the model's
        context, and "product" without a PRM."""
        if aggregation == "product" and rerank != "prm":
            raise ValueError(f"aggregation product multiplies probabilities, which {rerank} does not give")
        check_budget(longest, config)
        check_same_vocabulary(tokenizer, load_tokenizer(reward_model))
        options: dict[str, Any] = dict(device=config.device, dtype=getattr(torch, config.dtype))
        if rerank == "prm":
            model = load_prm(reward_model, tokenizer, **options)
        else:
            model = load_q_rm(reward_model, tokenizer, kind="orm" if rerank == "orm" else "qrm", **options)
        check_context(model, longest)
        check_packing(model, longest)
        self.share_prompts = shares_prompts(model, longest)
        self.config, self.aggregation = config, aggregation
        self.steps = StepScorer(model) if rerank == "prm" else None
        self.tokens = TokenScorer(model, reads_action=True)
        if self.steps is not None:
            self.separator = separator_id(tokenizer, separator_of(model.config))
            self.ends_a_step = ends_a_step(tokenizer).to(config.device)

    @torch.no_grad()
    def __call__(self, prompts: list[list[int]], responses: list[list[int]]) -> Tensor:
        """[S] float64, the score of each response to its prompt."""
        lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
        prompt_lens = list(map(len, prompts))
        changes = [int(a != b) for a, b in pairwise(prompts)]
        groups = list(accumulate(changes, initial=0))[: len(prompts)]  # neighbours with one prompt
        order = sorted(range(len(lengths)), key=lambda s: (groups[s], lengths[s]))
        budget, shared = token_budget(max(lengths), self.config), prompt_lens if self.share_prompts else None
        units, rows = sharing_units(order, groups, lengths, shared, budget)
        scores = torch.zeros(len(lengths), dtype=torch.float64)
        for bin in plan_microbatches(rows, max_tokens=budget)[0]:
            indices = [s for unit in sorted((units[i] for i in bin), key=lambda u: lengths[u[0]]) for s in unit]
            sequences = [prompts[i] + responses[i] for i in indices]
            batch = pack(
                sequences,
                [prompt_lens[i] for i in indices],
                share_prompts=self.share_prompts,
                device=self.config.device,
            )
            cu_seqlens = batch.action_cu_seqlens
            if self.steps is None:
                rewards = self.tokens(batch)
            else:
                batch, step_ends = find_steps(batch, self.ends_a_step, self.separator)
                rewards = prm_rewards(self.steps(batch, step_ends))
                cu_seqlens = torch.searchsorted(step_ends, cu_seqlens.long())
            for i, part in zip(indices, unpack(rewards.double(), cu_seqlens), strict=True):
                scores[i] = aggregate(part, self.aggregation)
        return scores


def aggregate(rewards: Tensor, aggregation: Aggregation) -> Tensor:
    """One score, 0-d, of the rewards [n] of an answer's steps or tokens.

    mean, min, last; product of P(right) = (1 + r) / 2 of every step; soft-min: sum of w r with w = softmax(-r / 0.1),
    which PURE maximises in training (arXiv 2504.15275, eq. 5).
    """
    if aggregation == "mean":
        return rewards.mean()
    if aggregation == "min":
        return rewards.min()
    if aggregation == "last":
        return rewards[-1]
    if aggregation == "product":
        return ((1 + rewards) / 2).prod()
    return ((-rewards / 0.1).softmax(0) * rewards).sum()


class Answers(NamedTuple):
    """N answers to each of P prompts."""

    prompts: list[list[int]]  # of each of the P N answers
    responses: list[list[int]]
    places: list[str]  # of each of the P prompts, its file and line
    right: Tensor  # [P, N] float64, 1 or 0
    scores: Tensor  # [P, N] float64


def sample_answers(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    examples: Rows[Example],
    config: Config,
    num_answers: int,
    judge: Judge | None,
) -> Answers:
    """`num_answers` answers to each prompt at temperature 1, judged; by the verifier where `judge` is None.

    Raises ValueError naming the prompt for a score that is not finite.
    """
    prompts = encode_prompts(tokenizer, examples)
    options: dict[str, Any] = dict(max_new_tokens=config.max_new_tokens, temperature=1.0, seed=config.seed)
    rollout = engine.generate(prompts, num_samples=num_answers, **options)
    labels = [example.label for example in examples for _ in range(num_answers)]
    right = verified(config.verifier, tokenizer, rollout.responses, rollout.finished, labels).double()
    asked = [prompt for prompt in prompts for _ in range(num_answers)]
    scores = right if judge is None else judge(asked, rollout.responses)
    by_prompt = _finite(scores, examples.places)
    return Answers(asked, rollout.responses, examples.places, right.view(-1, num_answers), by_prompt)


def _finite(scores: Tensor, places: list[str]) -> Tensor:
    """`scores` of all answers by prompt, [P, N]. Raises ValueError, naming the first prompt, for one not finite."""
    by_prompt = scores.view(len(places), -1)
    if not scores.isfinite().all():
        prompt, answer = (~by_prompt.isfinite()).nonzero()[0].tolist()
        got = by_prompt[prompt, answer].item()
        raise ValueError(f"scores must be finite, got {got} for an answer to {places[prompt]}")
    return by_prompt


def best_of(answers: Answers) -> list[BestOf]:
    """Best of k for k = 1, 2, 4, ... N. Each share is the mean over all subsets of k of a prompt's N answers, not over
    one of them; of equal scores none is preferred."""
    num_answers = answers.scores.shape[1]
    num_tokens = sum(map(len, answers.responses)) / len(answers.responses)
    sizes = [*(k for k in (2**i for i in range(num_answers.bit_length())) if k < num_answers), num_answers]
    chosen, any_of = (
        [_chosen_right(scores, answers.right, k) for k in sizes] for scores in (answers.scores, answers.right)
    )
    return [BestOf(k, a, b, k * num_tokens) for k, a, b in zip(sizes, chosen, any_of, strict=True)]


def early_reject(answers: Answers, judge: Judge, after: int) -> EarlyReject:
    """Best of N where the half of the answers with the lowest scores of their first `after` tokens is dropped there.

    An answer that has ended by then keeps its score. Of equal scores the earlier answers are kept. Raises as
    `sample_answers` does.
    """
    num_prompts, num_answers = answers.scores.shape
    partial = _finite(judge(answers.prompts, [response[:after] for response in answers.responses]), answers.places)
    order = partial.argsort(dim=1, descending=True, stable=True)
    kept = order[:, : -(-num_answers // 2)]
    scores, right = answers.scores.gather(1, kept), answers.right.gather(1, kept)
    lengths = torch.tensor(list(map(len, answers.responses))).view(num_prompts, -1)
    spent = lengths.clamp(max=after).scatter(1, kept, lengths.gather(1, kept)).double()
    return EarlyReject(
        accuracy=_chosen_right(scores, right, kept.shape[1]),
        num_tokens=spent.sum().item() / num_prompts,
        saved=1 - (spent.sum() / lengths.sum()).item(),
    )


def _chosen_right(scores: Tensor, right: Tensor, k: int) -> float:
    """Mean over prompts and subsets of k of their [P, N] answers: is the one of the highest score right?

    The answers of one score count as their mean. With m answers of a higher score and e equal to it, one of the e is
    chosen in C(N - m, k) - C(N - m - e, k) of the C(N, k) subsets.
    """
    num_answers, total = scores.shape[1], 0.0
    for of_scores, of_right in zip(scores, right, strict=True):
        above = 0
        for value in of_scores.unique().flip(0):
            equal = of_scores == value
            num_equal = int(equal.sum())
            left = num_answers - above
            subsets = math.comb(left, k) - math.comb(left - num_equal, k)
            total += subsets / math.comb(num_answers, k) * of_right[equal].mean().item()
            above += num_equal
    return total / len(scores)


def check_choice(rerank: str, reward_model: str | None, aggregation: str | None) -> Aggregation:
    """The aggregation, by default that of `rerank`. Raises ValueError for what is unknown or does not go together."""
    for name, value, known in (
        ("rerank", rerank, get_args(Rerank)),
        ("aggregation", aggregation, get_args(Aggregation)),
    ):
        if value is not None and value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value}")
    if (reward_model is None) != (rerank == "verifier"):
        raise ValueError(f"reward_model must be given to rerank by a model only, got {reward_model} for {rerank}")
    if rerank == "verifier" and aggregation is not None:
        raise ValueError(f"aggregation is of a reward model's scores, expected none for verifier, got {aggregation}")
    return aggregation or DEFAULTS[rerank]  # type: ignore[return-value]
