"""Gated layers that keep less: the bits of transformers' own, half of the rows that are kept."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import GemmaConfig, Qwen2Config
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from qrm_fast.rl.gated import Gated, keep_less
from qrm_fast.rl.linear import use_onednn
from qrm_fast.rl.models import load_policy, load_token_model
from qrm_fast.rl.tokenizers import load_tokenizer

SIZES = dict(hidden_size=24, intermediate_size=40)


def layers(kind, config, dtype=torch.float32):
    torch.manual_seed(0)
    plain = kind(config(**SIZES)).to(dtype)
    use_onednn(plain)
    ours = deepcopy(plain)
    keep_less(nn.Sequential(ours))
    return plain, ours


def run(layer, x):
    """Value and gradients, and the numbers that are kept for these."""
    kept = set()
    x = x.clone().requires_grad_()

    def keep(saved):
        kept.add((saved.data_ptr(), saved.numel()))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        y = layer(x)
    own = {(p.data_ptr(), p.numel()) for p in layer.parameters()}
    upstream = torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)
    wanted = [p for p in layer.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, [x, *wanted], upstream)], sum(n for _, n in kept - own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "config"), [(Qwen2MLP, Qwen2Config), (GemmaMLP, GemmaConfig)])
def test_the_same_bits_of_half_as_much(kind, config, dtype):
    plain, ours = layers(kind, config, dtype)
    assert isinstance(ours, Gated) and type(ours).__name__ == kind.__name__
    x = torch.randn(1, 7, 24).to(dtype)
    (got, kept), (expected, all_kept) = run(ours, x), run(plain, x)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert (kept, all_kept) == (7 * (24 + 2 * 40), 7 * (24 + 4 * 40))
    with torch.no_grad():
        assert torch.equal(ours(x), plain(x))


def test_what_is_frozen_has_no_gradient():
    plain, ours = layers(Qwen2MLP, Qwen2Config)
    for layer in (plain, ours):
        layer.down_proj.weight.requires_grad_(False)
    x = torch.randn(3, 24)
    assert all(torch.equal(a, b) for a, b in zip(run(ours, x)[0], run(plain, x)[0], strict=True))


def test_another_formula_is_left_alone():
    class Clamped(Qwen2MLP):
        def forward(self, x):
            return super().forward(x.clamp(max=1))

    assert not isinstance(layers(Clamped, Qwen2Config)[1], Gated)


@pytest.mark.parametrize("load", [load_policy, load_token_model])
def test_a_loaded_model_keeps_less(load):
    model = load("scratch:demo", load_tokenizer("arithmetic"))
    assert sum(isinstance(module, Gated) for module in model.modules()) == 3
