"""An implicit process reward model that learns from the verifier while the policy learns (PRIME, arXiv 2502.01456)."""

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import discounted_returns, group_advantages, implicit_rewards, per_token
from ...ops.gae import Advantages
from .. import ranks
from ..config import Config
from ..optimizer import AdamW
from ..policy import Policy
from .credit import Packed, penalty
from .q_rm import Implicit
from .verifier import Verifier


class Prime(Implicit):
    """r_t = beta (log pi_phi - log pi_ref)(a_t), where sigmoid(sum of r) predicts whether an answer is right.

    In every iteration phi takes one step down the cross-entropy to what `verifier` says of the answers; the phi that
    comes out rewards the same answers. A_t = sum over s >= t of gamma^(s-t) (r_s - b), where b is the mean over the
    other answers to the prompt of their mean r. Answers without a label have no part in the step.
    """

    def __init__(
        self, scorer: Policy, reference: Policy, beta: float, config: Config, kl_coef: float, verifier: Verifier
    ) -> None:
        super().__init__(scorer, reference, beta, config, kl_coef)
        self.verifier = verifier

    @cached_property
    def optimizer(self) -> AdamW:
        """Made when it is first asked for: several processes have other parameters once they share them."""
        return AdamW(self.scorer.train().parameters())

    def scores(self, packed: Packed) -> Tensor:
        reference = [self.reference(batch).logprobs for batch in packed.batches]
        self._learn(packed, reference)
        logprobs = [self.scorer(batch).logprobs for batch in packed.batches]
        rewards = implicit_rewards(torch.cat(logprobs), torch.cat(reference), beta=self.beta)
        # NaN where the step was not taken, because its gradient was not finite: then the policy takes none either
        return rewards + 0 * self.grad_norm

    @torch.enable_grad()
    def _learn(self, packed: Packed, reference: list[Tensor]) -> None:
        """One step towards the labels of all answers that have one; `reference` [T] of each batch."""
        labels, known = self.verifier.right[packed.answers], self.verifier.known[packed.answers].float()  # [S]
        num_answers = [len(batch.action_cu_seqlens) - 1 for batch in packed.batches]
        num_known = ranks.gather(known.sum()).sum()
        columns = (x.split(num_answers) for x in (labels, known / num_known.clamp(min=1)))
        measured = torch.zeros(2, device=labels.device)
        for batch, start, label, weight in zip(packed.batches, reference, *columns, strict=True):
            log_ratio, lengths = self.scorer(batch).logprobs - start, batch.action_cu_seqlens.diff().long()
            rewards = self.beta * torch.segment_reduce(log_ratio, "sum", lengths=lengths, unsafe=True)  # [S], maybe 0
            loss = F.binary_cross_entropy_with_logits(rewards, label, weight=weight, reduction="sum")
            loss.backward()
            measured += torch.stack([loss.detach(), (((rewards > 0) == (label > 0)) * weight).sum()])
        self.loss, self.accuracy = ranks.gather(measured).sum(0)
        self.grad_norm = self.optimizer.step(self.config.implicit_lr, self.config.max_grad_norm)

    def rewards_of_tokens(self, packed: Packed) -> Tensor:
        """[T] r, as it is: it is on the scale of what the verifier says."""
        return self._measured(packed)

    def of_tokens(self, packed: Packed) -> Advantages:
        rewards = self._measured(packed)
        means = torch.segment_reduce(rewards, "mean", lengths=packed.cu_seqlens.diff())  # [S]
        others = means - group_advantages(means, packed.group_ids, kind="rloo")  # [S], 0 for a lone answer
        rewards = rewards - per_token(others, packed.cu_seqlens, len(rewards))
        kl = penalty(packed, replace(self.config, kl_coef=self.kl_coef))
        rewards = rewards if kl is None else rewards - kl
        advantages = discounted_returns(rewards, packed.cu_seqlens, gamma=self.config.gamma)
        return Advantages(advantages, advantages)

    def metrics(self) -> dict[str, Tensor]:
        learned = {"loss": self.loss, "accuracy": self.accuracy, "grad_norm": self.grad_norm}
        return super().metrics() | {f"implicit/{name}": x for name, x in learned.items()}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.optimizer.load_state_dict(state["optimizer"])
