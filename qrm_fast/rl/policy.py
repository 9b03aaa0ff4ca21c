"""A policy as the loop sees it: packed answers in, log-probabilities or a loss out, and no logits in between."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import (
    PackedBatch,
    PolicyLoss,
    SampledTokens,
    TokenLogprobs,
    linear_logprobs,
    linear_policy_loss,
    linear_sample,
)
from .attention import backbone, of_transformers, packed_hidden, without_adapters


class Policy(nn.Module):
    """A causal language model, called on packed answers alone.

    `model` is a transformers model or one of peft's around it. Ids from `num_ids` on, which no token has, are left out
    of the head: they have probability 0 in sampling and training alike. Whatever wraps modules (FSDP2, activation
    checkpointing, adapters) sees every call, since both ways in run inside this module: make it the root of
    `fully_shard` and register `loss` as a forward method of FSDP2.
    """

    def __init__(self, model: Any, *, num_ids: int | None = None) -> None:
        super().__init__()
        self.model, self.num_ids = model, num_ids
        self.head()  # one that would not be trained as it is sampled is refused here

    def forward(self, batch: PackedBatch, *, temperature: float = 1.0) -> TokenLogprobs:
        """Log-probability, entropy and lse [T] of every action, of the model's logits / temperature."""
        hidden, targets = self._actions(batch)
        return self.head().logprobs(hidden, targets, temperature=temperature)

    def loss(self, batch: PackedBatch, advantages: Tensor, *, temperature: float = 1.0, **options: Any) -> PolicyLoss:
        """`linear_policy_loss` of every action with `advantages` [T]; `options` are that op's."""
        hidden, targets = self._actions(batch)
        if options.get("kind") == "gspo":
            options["cu_seqlens"] = batch.action_cu_seqlens
        return self.head().loss(hidden, targets, advantages, temperature=temperature, **options)

    def head(self) -> "PolicyHead":
        return policy_head(self.model, self.num_ids)

    def _actions(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Hidden states [T, D] that predict an action, and the actions [T]."""
        return packed_hidden(self.model, batch)[batch.action_index], batch.targets[batch.action_index]


class PolicyHead(NamedTuple):
    """logits = cap(hidden @ weight.T + bias) / temperature, cap(z) = softcap tanh(z / softcap)."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    softcap: float | None
    temperature: float

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, V] float32 of `hidden` [R, D]: float32 sums of exact products, as in the update."""
        if hidden.is_cuda and hidden.element_size() == 2:
            z = torch.mm(hidden, self.weight.T, out_dtype=torch.float32)
        else:
            z = hidden.float() @ self.weight.float().T
        z = z if self.bias is None else z + self.bias
        return (z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)) / self.temperature

    def sample(self, hidden: Tensor, uniforms: Tensor, *, temperature: float = 1.0) -> SampledTokens:
        """`linear_sample` of `hidden` [R, D] at `uniforms` [R], from the distribution that `logprobs` is of."""
        return linear_sample(hidden, self.weight, uniforms, **self._options(temperature))

    def logprobs(self, hidden: Tensor, targets: Tensor, *, temperature: float = 1.0) -> TokenLogprobs:
        """`linear_logprobs` of `hidden` [T, D] and `targets` [T], the model's logits divided by `temperature`."""
        return linear_logprobs(hidden, self.weight, targets, **self._options(temperature))

    def loss(
        self, hidden: Tensor, targets: Tensor, advantages: Tensor, *, temperature: float = 1.0, **options: Any
    ) -> PolicyLoss:
        """`linear_policy_loss` of the same."""
        return linear_policy_loss(hidden, self.weight, targets, advantages, **self._options(temperature), **options)

    def _options(self, temperature: float) -> dict[str, Any]:
        return dict(bias=self.bias, softcap=self.softcap, temperature=self.temperature * temperature)


def policy_head(model: Any, num_ids: int | None = None) -> PolicyHead:
    """The head of `model`, with the scale and the cap that its configuration names (Granite, Cohere; Gemma 2).

    Of its rows the first `num_ids`, or all.

    Raises ValueError for a head that is not one linear layer, as under an adapter of its own.
    """
    plain = without_adapters(model)
    output, config = plain.get_output_embeddings(), plain.config.get_text_config()
    if not isinstance(output, nn.Linear):
        raise ValueError(
            f"the head of {type(plain).__name__} must be one linear layer, without an adapter of its own, got "
            f"{type(output).__name__}"
        )
    temperature = (getattr(config, "logits_scaling", None) or 1.0) / (getattr(config, "logit_scale", None) or 1.0)
    weight: Tensor = output.weight
    bias: Tensor | None = output.bias
    if num_ids is not None and num_ids < len(weight):
        weight, bias = weight[:num_ids], None if bias is None else bias[:num_ids]
    return PolicyHead(weight, bias, getattr(config, "final_logit_softcapping", None), temperature)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Raise ValueError where a model makes its logits in some other way, which training would not see."""
    ids = torch.tensor([[1, 2, 3]], device=model.device)
    causal = torch.ones(1, 1, 3, 3, dtype=torch.bool, device=model.device).tril()
    inputs = dict(input_ids=ids, position_ids=ids - 1, attention_mask=causal, use_cache=False)
    head = policy_head(model)
    with of_transformers(type(model).__name__, model):
        expected = model(**inputs).logits[0].float()
        got = head.logits(backbone(model)(**inputs).last_hidden_state[0])
    if not got.isfinite().all():
        raise ValueError(
            f"the logits of {type(model).__name__} must be finite, got NaN or infinity: its weights are broken"
        )
    error, bound = (got - expected).abs().max(), max(1e-4, 4 * torch.finfo(model.dtype).eps) * expected.abs().max()
    if not error <= bound:
        raise ValueError(
            f"the logits of {type(model).__name__} must be its head's, with a bias, a softcap or a scale that the "
            f"configuration names, got logits that differ by {error:.2g}"
        )
