"""Policies, reward models and critics over Hugging Face backbones, and the packed attention they run on.

Models are ordinary checkpoints: a policy is an AutoModelForCausalLM, a Q-RM or a critic an
AutoModelForTokenClassification with one label. Only their backbone is called here: heads are the business of
`linear_logprobs` and `token_q`, on action rows, so that no [N, V] logits exist.
"""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from .packing import PackedBatch, pack
from .policy_head import check_head
from .tasks import arithmetic_tokenizer

if find_spec("flash_attn"):
    from flash_attn import flash_attn_varlen_func
else:
    flash_attn_varlen_func = None

# ---- attention


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    s_aux: Tensor | None = None,
    **_,
) -> tuple[Tensor, None]:
    """Causal attention inside each packed sequence, as transformers' attention interface calls it.

    `query`: [1, Hq, N, D], `key`, `value`: [1, Hk, N, D]. `cu_seq_lens_q`: [S+1], shared by keys. Returns
    [1, N, Hq, D]. 16-bit CUDA tensors go through flash_attn where installed, else torch's varlen_attn; everything
    else through one SDPA call per run of equally long sequences, a view of the packed rows, which is exact.
    Generation passes `attention_mask` [B, 1, Lq, Lk] instead of `cu_seq_lens_q`.

    Raises ValueError without either, and for what not every path can compute: dropout, softcap, attention sinks
    (`s_aux`), a sliding window shorter than the longest sequence.
    """
    if dropout or softcap or s_aux is not None or (sliding_window and max_length_q > sliding_window):
        raise ValueError(
            "packed attention computes plain causal attention, expected dropout 0, no softcap, no sinks and no sliding "
            f"window below the longest sequence {max_length_q}, got {dropout}, {softcap}, "
            f"{'no' if s_aux is None else len(s_aux)} sinks and {sliding_window}"
        )
    if cu_seq_lens_q is None:
        if attention_mask is None:
            raise ValueError("packed attention needs cu_seq_lens_q (or, to generate, a 4-D mask), got neither")
        out = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, H, D]
    if not q.is_cuda or q.element_size() > 2:
        return _attention_by_length(q, k, v, cu_seq_lens_q, scaling)[None], None
    bounds = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    if flash_attn_varlen_func is not None:
        out = flash_attn_varlen_func(q, k, v, *bounds, softmax_scale=scaling, causal=True)
    else:
        out = varlen_attn(q, k, v, *bounds, scale=scaling, window_size=(-1, 0), enable_gqa=True)
    return out[None], None


def _attention_by_length(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scaling: float) -> Tensor:
    """[N, H, D] -> [N, Hq, D]. Neighbours of equal length share one call: pack them sorted to need few."""
    out = []
    bos = 0
    lengths, repeats = torch.unique_consecutive(cu_seqlens.diff(), return_counts=True)
    for length, repeat in zip(lengths.tolist(), repeats.tolist(), strict=True):
        eos = bos + length * repeat
        run = (x[bos:eos].unflatten(0, (repeat, length)).transpose(1, 2) for x in (q, k, v))  # [R, H, L, D]
        attended = F.scaled_dot_product_attention(*run, is_causal=True, scale=scaling, enable_gqa=True)
        out.append(attended.transpose(1, 2).flatten(0, 1))
        bos = eos
    return torch.cat(out)


AttentionInterface.register("qrm_packed", packed_attention)


def packed_hidden(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Final-norm hidden states [N, D] of the backbone over a packed batch; the model's own head is never called."""
    cu_seqlens = batch.cu_seqlens.to(torch.int32)
    return model.base_model(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        attention_mask=None,
        use_cache=False,
        cu_seq_lens_q=cu_seqlens,
        cu_seq_lens_k=cu_seqlens,
        max_length_q=batch.max_seqlen,
        max_length_k=batch.max_seqlen,
    ).last_hidden_state[0]


@torch.no_grad()
def check_no_leak(model: PreTrainedModel) -> None:
    """Raise RuntimeError unless packed sequences are independent and causal in this model, on this device.

    Two sequences of three tokens; changing the first must leave every bit of the second's hidden states, changing
    the second's last token must leave every bit of the rows before it.
    """
    was_training = model.training
    model.eval()

    def hidden(first: list[int], second: list[int]) -> Tensor:
        return packed_hidden(model, pack([first, second], [1, 1], device=model.device))

    before = hidden([1, 2, 3], [4, 5, 6])
    if not torch.equal(before[3:], hidden([7, 8, 9], [4, 5, 6])[3:]):
        raise RuntimeError(
            f"{type(model).__name__} is not independent of the packing: changing one sequence changed its neighbour's "
            "hidden states, by attention that ignores the boundaries or by layers that compute a token by what else "
            "is in the batch, as experts do"
        )
    if not torch.equal(before[:5], hidden([1, 2, 3], [4, 5, 7])[:5]):
        raise RuntimeError("packed attention is not causal: changing a token changed the hidden states before it")
    model.train(was_training)


# ---- models and tokenizers

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
    auto: type,
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


BPE_VOCABULARY = 4096


def load_tokenizer(spec: str, corpus: Iterable[str] = ()) -> PreTrainedTokenizerBase:
    """A tokenizer: "arithmetic" (the embedded task's), "bpe" (byte-level BPE of at most 4096 ids, trained on
    `corpus`), or a Hugging Face id or directory.

    Raises ValueError for "bpe" without a corpus, for a scratch model and for a tokenizer without an EOS token.
    """
    if spec == "arithmetic":
        return arithmetic_tokenizer()
    if spec == "bpe":
        return _byte_level_bpe(corpus)
    if spec.startswith("scratch:"):
        raise ValueError(
            f'{spec} has no tokenizer of its own, expected tokenizer "arithmetic", "bpe" or a checkpoint\'s'
        )
    tokenizer = AutoTokenizer.from_pretrained(spec)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer must have an EOS token, which ends every response, got none in {spec}")
    return tokenizer


def _byte_level_bpe(corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    corpus = list(corpus)
    if not corpus:
        raise ValueError('tokenizer "bpe" is trained on the texts of the data, got no text')
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_VOCABULARY,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )


def check_same_vocabulary(policy: PreTrainedTokenizerBase, reward: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless every token has the same id for both: a Q-RM scores the policy's token ids."""
    ours, theirs = policy.get_vocab(), reward.get_vocab()
    if ours == theirs and policy.eos_token_id == reward.eos_token_id:
        return
    different = [token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)]
    token = min(different, default="")
    raise ValueError(
        f"policy and reward model must share one vocabulary, got {len(ours)} and {len(theirs)} tokens, EOS ids "
        f"{policy.eos_token_id} and {reward.eos_token_id}; token {token!r} has id {ours.get(token)} in the policy's "
        f"and {theirs.get(token)} in the reward model's"
    )


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str | Path) -> None:
    """Save weights (safetensors), config and tokenizer: a directory that plain transformers loads."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
