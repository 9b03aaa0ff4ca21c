"""Steps judged by a process reward model (PURE, arXiv 2504.15275)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ... import (
    discounted_returns,
    min_form_returns,
    min_gae,
    prm_rewards,
    process_advantages,
    process_diagnostics,
)
from ...ops.gae import Advantages
from .. import ranks
from ..config import Config
from ..data import STEP, Example, Prompt
from ..prm import ends_a_step, find_steps, separator_id, separator_of
from ..rollout import Rollout
from ..scorer import StepScorer
from .credit import Model, Packed, penalty
from .oracle import ArithmeticPRM
from .verifier import Verifier


class Process:
    """Steps judged by a PRM; what the worst of them is worth, over the other answers to the prompt (PURE).

    `verifier` judges the same answers where both are asked for: the presets say how the two streams meet.
    """

    def __init__(
        self,
        scorer: StepScorer | ArithmeticPRM,
        tokenizer: PreTrainedTokenizerBase,
        config: Config,
        weight: float,
        verifier: Verifier | None,
        verifier_weight: float,
    ) -> None:
        self.scorer, self.config, self.verifier = scorer, config, verifier
        self.models: list[Model] = [] if isinstance(scorer, ArithmeticPRM) else [scorer]
        separator = STEP if isinstance(scorer, ArithmeticPRM) else separator_of(scorer.model.config)
        self.coefs = dict(process_coef=weight, outcome_coef=verifier_weight)
        self.separator = separator_id(tokenizer, separator)
        self.ends_a_step = ends_a_step(tokenizer).to(config.device)
        self.form: dict[str, Any] = dict(operator=config.operator, temperature=config.process_temperature)

    def of_answers(self, rollout: Rollout, examples: Sequence[Prompt | Example], group_ids: Tensor) -> None:
        if self.verifier is not None:
            self.verifier.of_answers(rollout, examples, group_ids)

    def judge(self, packed: Packed) -> tuple[Tensor, Tensor]:
        """Rewards of the steps [K], and the actions that close them [K]."""
        rewards, ends, start = [], [], 0
        for batch in packed.batches:
            batch, step_ends = find_steps(batch, self.ends_a_step, self.separator)
            rewards.append(prm_rewards(self.scorer(batch, step_ends)))
            ends.append(step_ends + start)
            start += len(batch.action_index)
        self.step_rewards, self.step_ends = torch.cat(rewards), torch.cat(ends)
        return self.step_rewards, self.step_ends

    def rewards_of_tokens(self, packed: Packed) -> Tensor:
        """[T]: what sums up to the return of every step, with `operator` soft that is PURE's eq. 5."""
        num_tokens = len(packed.logprobs)
        step_rewards, step_ends = self.judge(packed)
        form = min_form_returns(step_rewards, step_ends, packed.cu_seqlens, **self.form, num_tokens=num_tokens)
        returns = form.returns
        ahead = torch.cat([returns[1:], returns.new_zeros(1)])
        ahead[packed.cu_seqlens[1:] - 1] = 0.0
        self._diagnose(packed, None)
        rewards = self.coefs["process_coef"] * (returns - ahead)
        if self.verifier is not None:
            rewards += self.coefs["outcome_coef"] * self.verifier.rewards_of_tokens(packed)
        return rewards

    def of_tokens(self, packed: Packed) -> Advantages:
        config, num_tokens = self.config, len(packed.logprobs)
        step_rewards, step_ends = self.judge(packed)
        kl = penalty(packed, config)
        if config.estimator == "min-gae":
            assert packed.values is not None  # there is a critic
            rewards = torch.full_like(packed.values, torch.inf).index_copy(0, step_ends, step_rewards)
            advantages, returns = min_gae(rewards, packed.values, packed.cu_seqlens, lam=config.lam)
            advantages = self.coefs["process_coef"] * advantages
            if self.verifier is not None:
                advantages = advantages + self.coefs["outcome_coef"] * self.verifier.of_tokens(packed).advantages
            if kl is not None:
                advantages = advantages - discounted_returns(kl, packed.cu_seqlens)
            self._diagnose(packed, advantages)
            return Advantages(advantages, returns)
        outcome: dict[str, Any] = dict(self.coefs)
        if self.verifier is not None:
            outcome |= dict(outcome_rewards=self.verifier.rewards[packed.answers])
            outcome |= dict(has_answer=self.verifier.known[packed.answers])
        advantages = process_advantages(
            step_rewards,
            step_ends,
            packed.cu_seqlens,
            packed.group_ids,
            **outcome,
            preset=config.process,
            mask_step_ends=config.mask_step_ends,
            **self.form,
            max_gen_len=config.max_new_tokens,
            kl=kl,
            num_tokens=num_tokens,
            process_group=ranks.world(),
        )
        self._diagnose(packed, advantages)
        return Advantages(advantages, advantages)

    def _diagnose(self, packed: Packed, advantages: Tensor | None) -> None:
        """What a reward that is being hacked shows first. Without `advantages` not whose they are."""
        steps = (self.step_rewards, self.step_ends, packed.cu_seqlens)
        diagnostics = process_diagnostics(*steps, advantages=advantages)
        self.diagnostics = {
            "reward/process": diagnostics.outcome.mean(),
            "reward/step_mean": self.step_rewards.mean(),
            "process/num_steps": torch.tensor(len(self.step_ends) / len(packed.answers)),
            "process/worst_position": diagnostics.worst_position.mean(),
            "process/effective_steps": diagnostics.effective_steps.mean(),
            "process/one_step": diagnostics.one_step,
            "process/short": diagnostics.short,
        }
        if diagnostics.one_step_mass is not None and diagnostics.short_mass is not None:
            self.diagnostics["process/one_step_mass"] = diagnostics.one_step_mass
            self.diagnostics["process/short_mass"] = diagnostics.short_mass

    def metrics(self) -> dict[str, Tensor]:
        return self.diagnostics | (self.verifier.metrics() if self.verifier is not None else {})

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
