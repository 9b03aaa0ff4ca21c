"""Models of random weights, on which whole passes are measured."""

from typing import Any

import torch
from torch import Tensor

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


def model_of(device: torch.device, *, shape: str = "", width: int = 0, num_layers: int = 0) -> Any:
    """A published `shape` of the cost model in bfloat16, or else a `qwen2`."""
    from transformers import AutoModelForCausalLM

    from qrm_fast.rl.cost_model import config_of

    if not shape:
        return qwen2(width, num_layers)[0].to(device)
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config_of(shape), dtype=torch.bfloat16)


def policy_of(device: torch.device, **size: Any) -> Any:
    """The same as the loop has it."""
    from qrm_fast.rl.gated import keep_less
    from qrm_fast.rl.linear import use_onednn
    from qrm_fast.rl.policy import Policy

    model = model_of(device, **size)
    model.set_attn_implementation("qrm_packed")
    use_onednn(model)
    keep_less(model)
    return Policy(model)


def in_float32(policy: Any) -> Any:
    """A copy of it, of the same weights: the truth that 16 bits are held to."""
    from copy import deepcopy

    return deepcopy(policy).float()


def distance(gradients: list[Tensor], exact: list[Tensor]) -> float:
    """Of all parameters' gradients, over the norm of `exact`."""
    parts = [((a.float() - b).norm(), b.norm()) for a, b in zip(gradients, exact, strict=True)]
    far, norm = (torch.stack(x).norm().item() for x in zip(*parts, strict=True))
    return far / norm


def assert_no_further(ours: list[Tensor], others: list[Tensor], exact: list[Tensor]) -> None:
    """Two ways in 16 bits round differently: ours may be a fifth further from float32's gradients than the other."""
    far, allowed = (distance(x, exact) for x in (ours, others))
    assert far <= 1.2 * allowed, f"gradients are {far:.3g} of their norm from float32's, the other way's {allowed:.3g}"
