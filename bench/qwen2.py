"""A Qwen2 of random weights, on which whole passes are measured."""

from typing import Any

import torch

VOCABULARY = 32768


def qwen2(width: int, num_layers: int) -> tuple[Any, int]:
    """The model, float32, and the number of its parameters between embeddings and head."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=num_layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    return model, sum(p.numel() for p in model.model.layers.parameters())
