"""Model FLOPs of an update, the numerator of MFU: what forward and backward pass of packed answers must compute."""

from typing import NamedTuple

from torch import nn

from .attention import backbone, without_adapters
from .policy import Policy


class UpdateFlops(NamedTuple):
    """A multiply-add counts as two. Nothing that is computed a second time counts, and no attention of the future."""

    per_token: float  # of every matrix below the head: 2 forward, 2 for its input's gradient, 2 for its own if trained
    per_action: float  # of the head, which action rows alone reach
    per_pair: float  # of a query and a key that it sees: two products, three times

    def total(self, num_tokens: float, num_actions: float, num_pairs: float) -> float:
        return self.per_token * num_tokens + self.per_action * num_actions + self.per_pair * num_pairs


def update_flops(policy: Policy) -> UpdateFlops:
    """Of a dense decoder; of a mixture of experts all count, also those that a token does not reach."""
    below, config = backbone(policy.model), without_adapters(policy.model).config.get_text_config()
    tables = {id(p) for part in below.modules() if isinstance(part, nn.Embedding) for p in part.parameters()}
    matrices = [p for p in below.parameters() if p.ndim > 1 and id(p) not in tables]
    weight = policy.head().weight
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return UpdateFlops(
        per_token=sum((6 if p.requires_grad else 4) * p.numel() for p in matrices),
        per_action=(6 if weight.requires_grad else 4) * weight.numel(),
        per_pair=3 * 2 * 2 * config.num_hidden_layers * config.num_attention_heads * head_dim,
    )
