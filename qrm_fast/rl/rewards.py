"""Reward streams: what an answer earned, as a whole or token by token. One class per stream."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .. import PackedBatch, group_advantages, per_token, q_advantages
from ..ops.gae import Advantages
from .config import Config
from .data import Example, Prompt
from .rollout import Rollout
from .scorer import TokenScorer
from .verifiers import find_verifier


class Packed(NamedTuple):
    """The answers of one iteration that are trained on: T actions of S answers, in the order of the micro-batches."""

    batches: list[PackedBatch]
    answers: Tensor  # [S] int64, the place of each answer in the rollout
    cu_seqlens: Tensor  # [S+1] int64, its actions
    group_ids: Tensor  # [S] int64, its prompt
    logprobs: Tensor  # [T] float32, of the tokens as they were sampled
    ref_logprobs: Tensor | None  # [T] float32, by the reference policy where there is a KL term
    values: Tensor | None  # [T] float32, by the critic where there is one
    seed: int  # of this iteration


class Credit(Protocol):
    """A reward stream, as the loop asks for it: first about answers, then about the tokens of those that are packed."""

    models: list[TokenScorer]  # resident, for the checks at the start

    def of_answers(self, rollout: Rollout, examples: Sequence[Prompt | Example], group_ids: Tensor) -> Tensor | None:
        """[S] advantages of whole answers, 0 for one that would change nothing; None where only tokens have one."""

    def of_tokens(self, packed: Packed) -> Advantages:
        """[T] advantages, and what a critic is to predict."""

    def metrics(self) -> dict[str, Tensor]:
        """0-d tensors by name, of the iteration that `of_tokens` was last asked about."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class QRM:
    """Token scores of a Q-RM, which are returns already: A_t = r_t - c V_t, with nothing left to discount or to sum."""

    def __init__(self, scorer: TokenScorer, config: Config) -> None:
        self.scorer, self.config = scorer, config
        self.models = [scorer]
        self.min_std: float | None = None

    def of_answers(self, rollout: Rollout, examples: Sequence[Prompt | Example], group_ids: Tensor) -> None:
        return None

    def scores(self, packed: Packed) -> Tensor:
        return torch.cat([self.scorer(batch) for batch in packed.batches])  # [T]

    def of_tokens(self, packed: Packed) -> Advantages:
        config, q = self.config, self.scores(packed)
        self.q_mean, self.q_std = q.mean(), q.std(correction=0)
        if self.min_std is None:  # a satisfied Q-RM lets its scale collapse, and dividing by it would amplify noise
            self.min_std = config.min_std_share * self.q_std.item()
        penalised = config.kl_in == "reward" and config.kl_coef > 0
        return q_advantages(
            q,
            packed.values,
            packed.cu_seqlens,
            value_coef=config.value_coef,
            value_normalize=config.value_normalize,
            center=config.center,
            scope=config.scope,
            group_ids=packed.group_ids if config.scope == "group" else None,
            eos_rescore=config.eos_rescore,
            kl_coef=config.kl_coef if penalised else 0.0,
            kl_estimator=config.kl_estimator,
            logprobs=packed.logprobs if penalised else None,
            ref_logprobs=packed.ref_logprobs if penalised else None,
            min_std=self.min_std,
        )

    def metrics(self) -> dict[str, Tensor]:
        return {"reward/q_mean": self.q_mean, "reward/q_std": self.q_std}

    def state_dict(self) -> dict[str, Any]:
        return {"min_std": self.min_std}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.min_std = state["min_std"]


class Random(QRM):
    """A control: one normal draw per answer in the place of the scores of its tokens."""

    def __init__(self, config: Config) -> None:
        self.config, self.models, self.min_std = config, [], None

    def scores(self, packed: Packed) -> Tensor:
        generator = torch.Generator().manual_seed(packed.seed)
        draws = torch.randn(len(packed.answers), generator=generator).to(packed.logprobs.device)
        return per_token(draws, packed.cu_seqlens, len(packed.logprobs))


class Verifier:
    """Answers judged right or wrong, beside the other answers to the prompt; a token's advantage is its answer's."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.models: list[TokenScorer] = []

    def of_answers(self, rollout: Rollout, examples: Sequence[Prompt | Example], group_ids: Tensor) -> Tensor:
        labels = [example.label for example in examples if isinstance(example, Example)]
        rewards = verified(self.config.verifier, self.tokenizer, rollout.responses, rollout.finished, labels)
        self.mean_reward = rewards.mean()
        self.advantages = group_advantages(rewards.to(group_ids.device), group_ids, kind=self.config.baseline)  # [S]
        return self.advantages

    def of_tokens(self, packed: Packed) -> Advantages:
        rows = per_token(self.advantages[packed.answers], packed.cu_seqlens, len(packed.logprobs))  # [T]
        return Advantages(rows, rows)

    def metrics(self) -> dict[str, Tensor]:
        return {"reward/mean": self.mean_reward}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def verified(
    verifier: str,
    tokenizer: PreTrainedTokenizerBase,
    responses: list[list[int]],
    finished: list[bool],
    labels: list[str],
) -> Tensor:
    """[S] float32: 1 where a response ended by itself and `verifier` (a name in VERIFIERS) finds it right, else 0.

    Raises ValueError for an unknown verifier.
    """
    is_right = find_verifier(verifier)
    texts = answer_texts(tokenizer, responses, finished)
    rows = zip(texts, finished, labels, strict=True)
    return torch.tensor([float(done and is_right(text, label)) for text, done, label in rows])


def answer_texts(tokenizer: PreTrainedTokenizerBase, responses: list[list[int]], finished: list[bool]) -> list[str]:
    """The texts of responses, without the tokens that ended them."""
    written = [response[:-1] if done else response for response, done in zip(responses, finished, strict=True)]
    return tokenizer.batch_decode(written, skip_special_tokens=True)
