"""What the loop asks of a reward stream, and what it hands over."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ... import PackedBatch, per_token
from ...ops.gae import Advantages
from ..config import Config
from ..data import Example, Prompt
from ..policy import Policy
from ..rollout import Rollout
from ..scorer import StepScorer, TokenScorer, VocabularyScorer

Model = TokenScorer | StepScorer | VocabularyScorer | Policy


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
    kl_share: float = 1.0  # of kl_coef, what counts in this iteration

    def answer_of_token(self) -> Tensor:
        """[T] int64, the answer of every action, counted among the S."""
        answers = torch.arange(len(self.answers), device=self.answers.device)
        return per_token(answers, self.cu_seqlens, len(self.logprobs))


class Credit(Protocol):
    """A reward stream, as the loop asks for it: first about answers, then about the tokens of those that are packed."""

    models: list[Model]  # resident, for the checks at the start

    def of_answers(self, rollout: Rollout, examples: Sequence[Prompt | Example], group_ids: Tensor) -> Tensor | None:
        """[S] advantages of whole answers, 0 for one that would change nothing; None where only tokens have one."""

    def of_tokens(self, packed: Packed) -> Advantages:
        """[T] advantages, and what a critic is to predict."""

    def metrics(self) -> dict[str, Tensor]:
        """0-d tensors by name, of the iteration that `of_tokens` was last asked about."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Stream(Credit, Protocol):
    """One kind of reward."""

    def rewards_of_tokens(self, packed: Packed) -> Tensor:
        """[T] rewards, which a critic's estimator sums up."""


def penalty(packed: Packed, config: Config) -> Tensor | None:
    """[T] the distance to the reference policy at every token, times its coefficient; None where there is none."""
    if config.kl_in != "reward" or not config.kl_coef:
        return None
    assert packed.ref_logprobs is not None  # there is a reference
    d = packed.logprobs - packed.ref_logprobs
    distance = {"abs": d.abs(), "k1": d, "k2": d.square() / 2, "k3": torch.expm1(-d) + d}[config.kl_estimator]
    return config.kl_coef * packed.kl_share * distance


def at_the_end(rewards: Tensor, packed: Packed) -> Tensor:
    """[T]: `rewards` [S] on the last tokens of the answers, which all have one, 0 elsewhere."""
    rows = torch.zeros_like(packed.logprobs)
    return rows.index_copy(0, packed.cu_seqlens[1:] - 1, rewards.to(rows.dtype))
