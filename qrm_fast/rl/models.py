"""Loading models, which are ordinary Hugging Face checkpoints: a policy is an AutoModelForCausalLM, a Q-RM or a critic
an AutoModelForTokenClassification with one label.
"""

from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .policy import check_head

Dtype = Literal["float32", "bfloat16"]  # of weights and activations; updates are float32
SCRATCH = {
    "scratch:demo": dict(hidden_size=128, num_hidden_layers=3, intermediate_size=256, initializer_range=0.05),
    "scratch:small": dict(hidden_size=256, num_hidden_layers=4, intermediate_size=704, initializer_range=0.02),
}


def load_policy(
    spec: str, tokenizer: PreTrainedTokenizerBase, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A causal language model: a Hugging Face id or directory, or "scratch:demo" / "scratch:small".

    Scratch models are small Llama networks with tied embeddings for `tokenizer`'s vocabulary, initialised from
    torch's global generator. Every model comes in evaluation mode. Raises ValueError for an unknown scratch size, a
    token classifier, too small a vocabulary, dropout, and logits that training would not see (`check_head`), OSError
    for an unknown id.
    """
    config = _config(spec, tokenizer)
    if any("TokenClassification" in name for name in config.architectures or []):
        raise ValueError(f"{spec} must be a causal language model, got {config.architectures[0]}")
    model = _load(AutoModelForCausalLM, spec, config, tokenizer, device, dtype)
    check_head(model)
    return model


def load_token_model(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_labels: int = 1,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A token classifier (Q-RM, critic: one label), from the same kinds of `spec` as `load_policy`.

    A checkpoint without a classification head gets a new one without bias (arXiv 2505.23363); a trained head is
    loaded as it is. `model.score` is the head; ValueError for an architecture that keeps it elsewhere.
    """
    config = _config(spec, tokenizer)
    config.num_labels = num_labels
    if not any("TokenClassification" in name for name in config.architectures or []):
        config.token_classification_bias = False
    model = _load(AutoModelForTokenClassification, spec, config, tokenizer, device, dtype)
    if not hasattr(model, "score"):
        raise ValueError(f"the token classifier of {spec} must keep its head in `score`, got {type(model).__name__}")
    return model


def load_q_rm(
    spec: str, tokenizer: PreTrainedTokenizerBase, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A trained Q-RM, to score with: evaluation mode, no gradients.

    Raises ValueError where the checkpoint has no trained scalar head, which transformers would make up at random,
    OSError where there is no checkpoint.
    """
    config = AutoConfig.from_pretrained(spec)
    name = (config.architectures or ["a model of unknown architecture"])[0]
    if not name.endswith("ForTokenClassification") or config.num_labels != 1:
        raise ValueError(f"{spec} must be a Q-RM, a token classifier with one label, got {name}, {config.num_labels}")
    return load_token_model(spec, tokenizer, device=device, dtype=dtype).eval().requires_grad_(False)


def _config(spec: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    if not spec.startswith("scratch:"):
        return AutoConfig.from_pretrained(spec)
    if spec not in SCRATCH:
        raise ValueError(f"model must be one of {', '.join(SCRATCH)} or a Hugging Face id or directory, got {spec}")
    # Llama and not Qwen2: transformers' AutoTokenizer replaces the tokenizer of a Qwen2 checkpoint by Qwen2's own.
    return LlamaConfig(
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        tie_word_embeddings=True,
        use_cache=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SCRATCH[spec],
    )


def _load(
    auto: Any,
    spec: str,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    device: str,
    dtype: torch.dtype,
) -> PreTrainedModel:
    options = dict(config=config, dtype=dtype, attn_implementation="qrm_packed")
    model = auto.from_config(**options) if spec.startswith("scratch:") else auto.from_pretrained(spec, **options)
    num_embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > num_embeddings:
        raise ValueError(f"{spec} must embed the tokenizer's {len(tokenizer)} tokens, got {num_embeddings}")
    # In training mode a dropout would make the ratio of a policy to itself other than 1.
    rates = [module.p for module in model.base_model.modules() if isinstance(module, nn.Dropout)]
    if any(rates):
        raise ValueError(f"the dropout of {spec} must be 0 in its configuration, got {max(rates)}")
    return model.to(device).eval()


def check_context(model: PreTrainedModel, num_tokens: int) -> None:
    """Raise ValueError where a sequence of `num_tokens` has more positions than the model was built for."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and num_tokens > most:
        raise ValueError(
            f"the longest sequence must fit the {most} positions of {type(model).__name__}, got {num_tokens}"
        )
