"""Loading models, which are ordinary Hugging Face checkpoints: a policy is an AutoModelForCausalLM, a Q-RM or a critic
an AutoModelForTokenClassification with one label, a process reward model (PRM) one with two.
"""

import math
import re
import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GenericForTokenClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)
from transformers.utils import cached_file

from .attention import backbone, of_transformers, without_adapters
from .checkpoint import MODEL_CONFIG
from .gated import keep_less
from .gguf import checkpoint_of
from .linear import use_onednn
from .lora import merged, whole_modules
from .policy import check_head
from .tokenizers import adapter_base

SCRATCH = {
    "scratch:demo": dict(hidden_size=128, num_hidden_layers=3, intermediate_size=256, initializer_range=0.05),
    "scratch:small": dict(hidden_size=256, num_hidden_layers=4, intermediate_size=704, initializer_range=0.02),
}


def load_policy(
    spec: str, tokenizer: PreTrainedTokenizerBase, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A causal language model: a Hugging Face id, directory or GGUF file, or "scratch:demo" / "scratch:small".

    Scratch models are small Llama networks with tied embeddings for `tokenizer`'s vocabulary, initialised from
    torch's global generator. An adapter of peft's comes merged into its model. Of a model of text and images the text
    model is taken, as a checkpoint of its own. Every model comes in evaluation mode, without the dropout and jitter
    that its configuration may name. Raises ValueError for an unknown scratch size, a token classifier, an architecture
    without a language model, a checkpoint that lacks weights, too small a vocabulary and logits that training would not
    see (`check_head`), OSError for an unknown id.
    """
    config = _config(spec, tokenizer)
    if _has_token_head(config) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        got = (config.architectures or [type(config).__name__])[0]
        raise ValueError(f"{spec} must be a causal language model, got {got}")
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
    """A token classifier (Q-RM, critic: one label; PRM: two), from the same kinds of `spec` as `load_policy`.

    A model without a classification head gets a new one, with one label without bias (arXiv 2505.23363), with two with
    a bias (arXiv 2504.15275); a trained head is loaded as it is. `model.score` is the head, also for a family that
    transformers has no such class for: its class is made here, and a checkpoint of it is loaded here alone. Raises as
    `load_policy` does.
    """
    config = _config(spec, tokenizer)
    trained = _has_token_head(config)
    config.num_labels = num_labels
    if not trained:
        config.token_classification_bias = num_labels > 1
    new_weights = () if trained else ("score.",)
    root = _root(spec)
    if trained or root == spec:
        return _load(_token_class(config), spec, config, tokenizer, device, dtype, new_weights)
    # the adapter of a policy may change its head, too: merged there, and the backbone taken
    policy = load_policy(spec, tokenizer, device=device, dtype=dtype)
    model = _load(_token_class(config), root, config, tokenizer, device, dtype, new_weights)
    backbone(model).load_state_dict(backbone(policy).state_dict())
    return model


def load_q_rm(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    kind: Literal["qrm", "orm", "either"] = "qrm",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A trained Q-RM, or an ORM, to score with: evaluation mode, no gradients.

    Raises ValueError where the checkpoint has no trained scalar head, which transformers would make up at random, and
    where it says that it was trained as another kind (one that says nothing is taken for what it is asked to be),
    OSError where there is no checkpoint.
    """
    what = {"qrm": "a Q-RM", "orm": "an ORM", "either": "a Q-RM or an ORM"}[kind]
    model = _load_trained(what, spec, tokenizer, 1, device, dtype)
    trained_as = getattr(model.config, "reward_model", None)
    if kind != "either" and trained_as not in (None, kind):
        raise ValueError(f"{spec} must be {what}, got a model that was trained with --kind {trained_as}")
    return model


def load_prm(
    spec: str, tokenizer: PreTrainedTokenizerBase, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A trained PRM, the same: a token classifier with two labels, of which 1 is "right" (PURE's published format)."""
    return _load_trained("a PRM", spec, tokenizer, 2, device, dtype)


def load_vocabulary_q(
    spec: str, tokenizer: PreTrainedTokenizerBase, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A trained Q-RM with a vocabulary head, the same: a causal language model whose logits are the Q-values.

    Raises ValueError for a model that was not trained as one, such as a policy.
    """
    if not is_vocabulary_q(spec):
        raise ValueError(f"{spec} must be a Q-RM with a vocabulary head, got a model that was not trained as one")
    model = load_policy(spec, tokenizer, device=device, dtype=dtype)
    return model.eval().requires_grad_(False)


def is_vocabulary_q(spec: str) -> bool:
    """Whether the checkpoint at `spec` was trained as a Q-RM with a vocabulary head."""
    return getattr(_config_at(spec), "reward_model", None) == "qrm-vocab"


def load_implicit(
    spec: str, tokenizer: PreTrainedTokenizerBase, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedModel, float]:
    """A trained implicit reward model (DPO's policy), the same; its reference, and beta of its rewards.

    Raises ValueError for a model that was not trained as one, OSError where the reference is gone.
    """
    model = load_policy(spec, tokenizer, device=device, dtype=dtype)
    reference = getattr(model.config, "reference_model", None)
    if reference is None:
        raise ValueError(f"{spec} must be an implicit reward model, which names its reference, got one without")
    models = (
        x.eval().requires_grad_(False) for x in (model, load_policy(reference, tokenizer, device=device, dtype=dtype))
    )
    return (*models, model.config.implicit_beta)


def num_labels(spec: str) -> int:
    """Labels of the token classifier at `spec`: 1 of a Q-RM, 2 of a PRM. 0 for any other model."""
    config = _config_at(spec)
    return config.num_labels if _has_token_head(config) else 0


def _load_trained(
    what: str, spec: str, tokenizer: PreTrainedTokenizerBase, labels: int, device: str, dtype: torch.dtype
) -> PreTrainedModel:
    if num_labels(spec) != labels:
        config = _config_at(spec)
        name = (config.architectures or ["a model of unknown architecture"])[0]
        expected = f"{what}, a token classifier with {('one label', 'two labels')[labels - 1]}"
        raise ValueError(f"{spec} must be {expected}, got {name}, {config.num_labels}")
    model = load_token_model(spec, tokenizer, num_labels=labels, device=device, dtype=dtype)
    return model.eval().requires_grad_(False)


def _has_token_head(config: PreTrainedConfig) -> bool:
    return any(name.endswith(("ForTokenClassification", "ForTokenScores")) for name in config.architectures or [])


def _token_class(config: PreTrainedConfig) -> Any:
    """transformers' class of token classifiers with a head named `score`, or one like it on the family's backbone."""
    if type(config) not in MODEL_MAPPING:
        raise ValueError(f"expected an architecture with a text backbone, got {type(config).__name__}")
    backbone = MODEL_MAPPING[type(config)]
    theirs = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING.get(type(config), object)
    if issubclass(theirs, GenericForTokenClassification):
        return AutoModelForTokenClassification
    family: Any = next(base for base in backbone.__mro__[1:] if issubclass(base, PreTrainedModel))

    class TokenScores(family):
        def __init__(self, config: PreTrainedConfig) -> None:
            super().__init__(config)
            setattr(self, self.base_model_prefix, backbone(config))
            self.score = nn.Linear(config.hidden_size, config.num_labels, bias=config.num_labels > 1)
            self.post_init()

        def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
            """Scores [B, L, num_labels]."""
            return self.score(self.base_model(input_ids, **inputs).last_hidden_state)

    TokenScores.__name__ = f"{backbone.__name__.removesuffix('Model')}ForTokenScores"
    return TokenScores


def _config(spec: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    if not spec.startswith("scratch:"):
        return _text_config(_config_at(spec))
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


def _root(spec: str) -> str:
    """The whole model below the adapter, or the adapters, at `spec`."""
    base = None if spec.startswith("scratch:") else adapter_base(spec)
    return spec if base is None else _root(base)


def _config_at(spec: str) -> PreTrainedConfig:
    """The configuration of the model at `spec`; of an adapter the one that lies beside it, or its base's."""
    spec = checkpoint_of(spec)
    base = adapter_base(spec)
    if base is None:
        return AutoConfig.from_pretrained(spec)
    own = cached_file(spec, MODEL_CONFIG, _raise_exceptions_for_missing_entries=False)
    return _config_at(base) if own is None else AutoConfig.from_pretrained(own)


# Where a model of text and images keeps what belongs to its text model.
TEXT_WEIGHTS = {
    r"^(?:model\.)?language_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?language_model\.(?:model\.)?": "model.",
}
# Text models of Qwen-VL whose three rotary positions are one where there is no image.
PLAIN_QWEN = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}


def _text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the text model inside a model of text and images; any other as it is."""
    text = config.get_text_config()
    if text is config:
        return config
    text.architectures = None
    if text.model_type not in PLAIN_QWEN:
        return text
    values = text.to_dict()
    values["rope_parameters"] = {k: v for k, v in values["rope_parameters"].items() if not k.startswith("mrope")}
    values["tie_word_embeddings"] = config.tie_word_embeddings
    del values["model_type"]
    return AutoConfig.for_model(PLAIN_QWEN[text.model_type], **values)


def _load(
    auto: Any,
    spec: str,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    device: str,
    dtype: torch.dtype,
    new_weights: tuple[str, ...] = (),
) -> PreTrainedModel:
    """`new_weights`: beginnings of the names of weights that the checkpoint need not hold."""
    spec = checkpoint_of(spec)
    base = None if spec.startswith("scratch:") else adapter_base(spec)
    if base is not None:
        return merged(_load(auto, base, config, tokenizer, device, dtype, whole_modules(spec)), spec)
    _switch_dropout_off(spec, config)
    options: dict[str, Any] = dict(dtype=dtype, attn_implementation="qrm_packed")
    with of_transformers(spec):
        if spec.startswith("scratch:"):
            model, missing = auto.from_config(config, **options), []
        else:
            whole = AutoConfig.from_pretrained(spec)
            inside = whole.get_text_config() is not whole
            options |= dict(config=config, key_mapping=TEXT_WEIGHTS if inside else None, output_loading_info=True)
            model, found = auto.from_pretrained(spec, **options)
            if inside:
                del model._weight_conversions  # or the text model would be saved under the names it had inside
            missing = sorted(name for name in found["missing_keys"] if not name.startswith(new_weights))
    if missing:
        raise ValueError(
            f"{spec} must hold every weight of {type(model).__name__}, got none for {missing[0]}, one of {len(missing)}"
        )
    num_ids, num_embeddings = num_token_ids(tokenizer), model.get_input_embeddings().num_embeddings
    if num_ids > num_embeddings:
        raise ValueError(f"{spec} must embed the tokenizer's {num_ids} tokens, got {num_embeddings}")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    use_onednn(model)
    keep_less(model)
    return model.to(device).eval()


def _switch_dropout_off(spec: str, config: PreTrainedConfig) -> None:
    """With it, a policy's ratio to itself would not be 1 in training mode."""
    values = config.to_dict().items()
    rates = {
        name: x
        for name, x in values
        if re.match("(?!classifier|summary).*(drop|jitter_noise)", name) and type(x) is float and x
    }
    for name in rates:
        setattr(config, name, 0.0)
    if rates:
        named = ", ".join(f"{name} {rate}" for name, rate in rates.items())
        warnings.warn(f"the dropout that {spec} configures is switched off: {named}", stacklevel=2)


def num_token_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id of a token. Embeddings may be padded beyond it."""
    return max(tokenizer.get_vocab().values()) + 1


def check_context(model: Any, num_tokens: int) -> None:
    """Raise ValueError where a sequence of `num_tokens` has more positions than the model was built for.

    Past the original positions of LongRoPE one long sequence would turn the embeddings of all that it is packed with.
    """
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        most = min(most or math.inf, rope["original_max_position_embeddings"])
    if most is not None and num_tokens > most:
        raise ValueError(
            f"the longest sequence must fit the {most} positions of {type(without_adapters(model)).__name__}, got "
            f"{num_tokens}"
        )
