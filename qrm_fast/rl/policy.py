"""The head of a causal language model: from hidden states to log-probabilities, as the model itself makes them."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

from .. import TokenLogprobs, linear_logprobs


class PolicyHead(NamedTuple):
    """logits = cap(hidden @ weight.T + bias) / temperature, cap(z) = softcap tanh(z / softcap)."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    softcap: float | None
    temperature: float

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, V] float32 of `hidden` [R, D], to sample from."""
        z = linear(hidden, self.weight, self.bias).float()
        return (z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)) / self.temperature

    def logprobs(self, hidden: Tensor, targets: Tensor, *, temperature: float = 1.0) -> TokenLogprobs:
        """`linear_logprobs` of `hidden` [T, D] and `targets` [T], the model's logits divided by `temperature`."""
        temperature *= self.temperature
        return linear_logprobs(
            hidden, self.weight, targets, bias=self.bias, softcap=self.softcap, temperature=temperature
        )


def policy_head(model: PreTrainedModel) -> PolicyHead:
    """The head of `model`, with the scale and the cap that its configuration names (Granite, Cohere; Gemma 2)."""
    output, config = model.get_output_embeddings(), model.config.get_text_config()
    temperature = (getattr(config, "logits_scaling", None) or 1.0) / (getattr(config, "logit_scale", None) or 1.0)
    return PolicyHead(output.weight, output.bias, getattr(config, "final_logit_softcapping", None), temperature)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Raise ValueError where a model makes its logits in some other way, which training would not see."""
    ids = torch.tensor([[1, 2, 3]], device=model.device)
    causal = torch.ones(1, 1, 3, 3, dtype=torch.bool, device=model.device).tril()
    inputs = dict(input_ids=ids, position_ids=ids - 1, attention_mask=causal, use_cache=False)
    expected = model(**inputs).logits.float()
    got = policy_head(model).logits(model.base_model(**inputs).last_hidden_state)
    error, bound = (got - expected).abs().max(), max(1e-4, 4 * torch.finfo(model.dtype).eps) * expected.abs().max()
    if not error <= bound:
        raise ValueError(
            f"the logits of {type(model).__name__} must be its head's, with a bias, a softcap or a scale that the "
            f"configuration names, got logits that differ by {error:.2g}"
        )
