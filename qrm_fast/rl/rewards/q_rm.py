"""Scores of a Q-RM for every token (arXiv 2505.23363), and their control."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import per_token, q_advantages
from ...ops.gae import Advantages
from ..config import Config
from ..data import Example, Prompt
from ..rollout import Rollout
from ..scorer import StepScorer, TokenScorer
from .credit import Packed


class QRM:
    """Token scores of a Q-RM, which are returns already: A_t = r_t - c V_t, with nothing left to discount or to sum."""

    def __init__(self, scorer: TokenScorer, config: Config, kl_coef: float) -> None:
        self.scorer, self.config, self.kl_coef = scorer, config, kl_coef
        self.models: list[TokenScorer | StepScorer] = [scorer]
        self.min_std: float | None = None

    def of_answers(self, rollout: Rollout, examples: Sequence[Prompt | Example], group_ids: Tensor) -> None:
        return None

    def scores(self, packed: Packed) -> Tensor:
        return torch.cat([self.scorer(batch) for batch in packed.batches])  # [T]

    def rewards_of_tokens(self, packed: Packed) -> Tensor:
        raise AssertionError("scores of a Q-RM are returns, which `check` keeps from being summed")

    def of_tokens(self, packed: Packed) -> Advantages:
        config, q = self.config, self.scores(packed)
        self.q_mean, self.q_std = q.mean(), q.std(correction=0)
        if self.min_std is None:  # a satisfied Q-RM lets its scale collapse, and dividing by it would amplify noise
            self.min_std = config.min_std_share * self.q_std.item()
        penalised = self.kl_coef > 0
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
            kl_coef=self.kl_coef,
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

    def __init__(self, config: Config, kl_coef: float) -> None:
        self.config, self.kl_coef, self.models, self.min_std = config, kl_coef, [], None

    def scores(self, packed: Packed) -> Tensor:
        generator = torch.Generator().manual_seed(packed.seed)
        draws = torch.randn(len(packed.answers), generator=generator).to(packed.logprobs.device)
        return per_token(draws, packed.cu_seqlens, len(packed.logprobs))
