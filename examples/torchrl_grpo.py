"""torchrl: GRPOLoss (and DAPO, CISPOLoss) with log-probability and entropy in one read of the logits.

    loss = FastGRPOLoss(actor, masking_strategy="rlhf")

`GRPOLoss._get_cur_log_prob` is a private name, which torchrl documents as the place for a computation of one's own; it
returns (log-probability [B, L], distribution, False), and the distribution is asked for `mask` and `entropy()`.
"""

from torchrl.modules.distributions.discrete import LLMMaskedCategorical
from torchrl.objectives.llm import DAPO, CISPOLoss, GRPOLoss

from qrm_fast import gather_logprobs


class ScoredActions(LLMMaskedCategorical):
    """A position-masked categorical that knows `actions` [B, L] (-100: none) and has read its logits [B, L, V]."""

    def __init__(self, logits, mask, actions):
        super().__init__(logits, mask)
        targets = actions.masked_fill(~mask, -100).flatten()
        scores = gather_logprobs(logits.flatten(0, -2), targets)
        self.logprobs, self._entropy = (x.view(mask.shape) for x in (scores.logprobs, scores.entropy))

    def entropy(self):
        return self._entropy


class OneRead:
    def _get_cur_log_prob(self, tensordict):
        dist = getattr(self.actor_network, f"_get_{self.masking_strategy}_dist")(tensordict)
        action = tensordict.get(self.tensor_keys.action, as_padded_tensor=True, padding_side="left", padding_value=-100)
        scored = ScoredActions(dist.logits, dist.mask, action)
        return scored.logprobs, scored, False


class FastGRPOLoss(OneRead, GRPOLoss):
    pass


class FastDAPO(OneRead, DAPO):
    pass


class FastCISPOLoss(OneRead, CISPOLoss):
    pass
