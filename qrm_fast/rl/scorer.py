"""What a reward model says of actions: one number of each (Q-RM, ORM, critic), of each step two (PRM)."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import PackedBatch, token_q
from .attention import packed_hidden
from .policy import policy_head


class TokenScorer(nn.Module):
    """A backbone with a scalar head, called on packed answers; what wraps modules sees every call, as with `Policy`.

    A Q-RM scores an action by the state that has consumed it, a critic values the state before it (`reads_action`).
    """

    def __init__(self, model: Any, *, reads_action: bool) -> None:
        super().__init__()
        self.model, self.reads_action = model, reads_action

    def forward(self, batch: PackedBatch) -> Tensor:
        """[T] float32."""
        rows = batch.action_index + 1 if self.reads_action else batch.action_index
        score = self.model.score
        return token_q(packed_hidden(self.model, batch)[rows], score.weight, bias=score.bias)


class VocabularyScorer(nn.Module):
    """A causal language model whose logits are Q-values: Q(s, a) from the state before the action."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        head = policy_head(model)
        if head.bias is not None or head.softcap is not None or head.temperature != 1:
            raise ValueError(
                f"a vocabulary Q-head must be one matrix, got that of {type(model).__name__} with a bias, a softcap or "
                "a scale"
            )

    def forward(self, batch: PackedBatch) -> Tensor:
        """[T] float32, of the actions that were taken."""
        return token_q(self.hidden(batch), policy_head(self.model).weight, batch.targets[batch.action_index])

    def hidden(self, batch: PackedBatch) -> Tensor:
        """[T, D], from which the head makes Q of every token."""
        return packed_hidden(self.model, batch)[batch.action_index]


class StepScorer(nn.Module):
    """A backbone with a head of two labels, wrong and right, read where a step has been closed: a PRM."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PackedBatch, step_ends: Tensor) -> Tensor:
        """Logits [K, 2] float32 at the actions `step_ends` [K]."""
        hidden = packed_hidden(self.model, batch)[batch.action_index[step_ends] + 1]
        weight, bias = self.model.score.weight, self.model.score.bias
        # the head of `TokenScorer` twice: float32 sums, and a row's bits are its own
        columns = [token_q(hidden, weight[c], bias=None if bias is None else bias[c : c + 1]) for c in range(2)]
        return torch.stack(columns, -1)
