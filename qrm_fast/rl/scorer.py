"""One number for every action, from a token classifier with one label: a Q-RM or a critic."""

from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import PackedBatch, token_q
from .attention import packed_hidden


class TokenScorer(nn.Module):
    """A backbone with a scalar head, called on packed answers; what wraps modules sees every call, as with `Policy`.

    A Q-RM scores an action by the state that has consumed it, a critic values the state before it (`reads_action`).
    """

    def __init__(self, model: PreTrainedModel, *, reads_action: bool) -> None:
        super().__init__()
        self.model, self.reads_action = model, reads_action

    def forward(self, batch: PackedBatch) -> Tensor:
        """[T] float32."""
        rows = batch.action_index + 1 if self.reads_action else batch.action_index
        score = self.model.score
        return token_q(packed_hidden(self.model, batch)[rows], score.weight, bias=score.bias)
