"""Scores of every token: a Q-RM's (arXiv 2505.23363), what stands in their place in its comparisons, a control."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import implicit_rewards, linear_q_values, per_token, q_advantages, q_token_rewards
from ...ops.gae import Advantages
from ...ops.moments import moments
from .. import ranks
from ..attention import packed_hidden
from ..config import Config
from ..data import Example, Prompt
from ..policy import Policy, policy_head
from ..rollout import Rollout
from ..scorer import TokenScorer, VocabularyScorer
from .credit import Model, Packed, at_the_end


class QRM:
    """Token scores of a Q-RM, which are returns already: A_t = r_t - c V_t, with nothing left to discount or to sum."""

    def __init__(self, scorer: TokenScorer, config: Config, kl_coef: float) -> None:
        self.scorer: Any = scorer
        self.config, self.kl_coef = config, kl_coef
        self.models: list[Model] = [scorer]
        self.min_std: float | None = None

    def of_answers(self, rollout: Rollout, examples: Sequence[Prompt | Example], group_ids: Tensor) -> None:
        return None

    def scores(self, packed: Packed) -> Tensor:
        return torch.cat([self.scorer(batch) for batch in packed.batches])  # [T]

    def rewards_of_tokens(self, packed: Packed) -> Tensor:
        """[T] scores over their deviation, where they are rewards: `check` keeps those of a Q-RM from being summed."""
        q = self._measured(packed)
        return q_token_rewards(q, packed.cu_seqlens, **self._scale(packed))

    def of_tokens(self, packed: Packed) -> Advantages:
        config, q = self.config, self._measured(packed)
        penalised = self.kl_coef > 0
        return q_advantages(
            q,
            packed.values,
            packed.cu_seqlens,
            value_coef=config.value_coef,
            value_normalize=config.value_normalize,
            eos_rescore=config.eos_rescore,
            kl_coef=self.kl_coef * packed.kl_share,
            kl_estimator=config.kl_estimator,
            logprobs=packed.logprobs if penalised else None,
            ref_logprobs=packed.ref_logprobs if penalised else None,
            **self._scale(packed),
        )

    def _measured(self, packed: Packed) -> Tensor:
        """The scores, whose mean and deviation are reported."""
        q = self.scores(packed)
        count, self.q_mean, squares = moments(q, process_group=ranks.world())[0]
        self.q_std = (squares / count).sqrt()
        if self.min_std is None:  # a satisfied Q-RM lets its scale collapse, and dividing by it would amplify noise
            self.min_std = self.config.min_std_share * self.q_std.item()
        return q

    def _scale(self, packed: Packed) -> dict[str, Any]:
        config = self.config
        group_ids = packed.group_ids if config.scope == "group" else None
        joined = ranks.world() if config.scope == "batch" else None
        scope: dict[str, Any] = dict(scope=config.scope, group_ids=group_ids, process_group=joined)
        return dict(center=config.center, min_std=self.min_std, **scope)

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


class VocabularyQ(QRM):
    """A Q-RM whose logits are Q-values: Q(s, a) - E_pi[Q(s, .)], exact, from both heads in one sweep of the vocabulary.

    Q is the Q-function up to a factor, which scaling removes, and a function of the state, which E_pi[Q] does
    (arXiv 2505.23363, Proposition 3.4).
    """

    def __init__(self, scorer: VocabularyScorer, policy: Policy, config: Config, kl_coef: float) -> None:
        self.scorer, self.policy, self.config, self.kl_coef = scorer, policy, config, kl_coef
        self.models, self.min_std = [scorer], None
        head = policy.head()
        if head.bias is not None or head.softcap is not None:
            raise ValueError('reward "qrm-vocab" needs a policy whose head has neither a bias nor a softcap')

    def scores(self, packed: Packed) -> Tensor:
        with ranks.whole(self.policy), ranks.whole(self.scorer):
            return self._scores(packed)

    def _scores(self, packed: Packed) -> Tensor:
        head = self.policy.head()
        q_weight = policy_head(self.scorer.model, len(head.weight)).weight
        advantages = []
        for batch in packed.batches:
            hidden = packed_hidden(self.policy.model, batch)[batch.action_index]
            values = linear_q_values(
                hidden,
                head.weight,
                self.scorer.hidden(batch),
                q_weight,
                batch.targets[batch.action_index],
                temperature=head.temperature * self.config.temperature,
            )
            advantages.append(values.q - values.expected_q)
        return torch.cat(advantages)


class Outcome(QRM):
    """An outcome reward model: its score of the last token, on every token; for `gae` on the last one alone."""

    def scores(self, packed: Packed) -> Tensor:
        last = super().scores(packed)[packed.cu_seqlens[1:] - 1]  # [S]
        return per_token(last, packed.cu_seqlens, len(packed.logprobs))

    def rewards_of_tokens(self, packed: Packed) -> Tensor:
        return at_the_end(super().rewards_of_tokens(packed)[packed.cu_seqlens[1:] - 1], packed)


class Implicit(QRM):
    """Rewards that a policy trained on preferences or judgements implies: its log-ratio to where it started."""

    def __init__(self, scorer: Policy, reference: Policy, beta: float, config: Config, kl_coef: float) -> None:
        self.scorer, self.reference, self.beta = scorer, reference, beta
        self.config, self.kl_coef, self.models, self.min_std = config, kl_coef, [scorer, reference], None

    def scores(self, packed: Packed) -> Tensor:
        return torch.cat(
            [
                implicit_rewards(self.scorer(batch).logprobs, self.reference(batch).logprobs, beta=self.beta)
                for batch in packed.batches
            ]
        )
