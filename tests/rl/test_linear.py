"""oneDNN's linear layers against float64, and that a loaded model has them."""

import pytest
import torch
from torch import nn

from qrm_fast import pack
from qrm_fast.rl import gated, linear
from qrm_fast.rl.attention import packed_hidden
from qrm_fast.rl.linear import Linear, use_onednn
from qrm_fast.rl.models import load_policy, load_token_model
from qrm_fast.rl.tokenizers import load_tokenizer


def layers(bias):
    torch.manual_seed(0)
    plain = nn.Linear(48, 33, bias=bias)
    ours = nn.Sequential(nn.Linear(48, 33, bias=bias))
    ours[0].load_state_dict(plain.state_dict())
    use_onednn(ours)
    assert type(ours[0]) is Linear
    return plain, ours[0]


def run(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], torch.linspace(-1, 1, y.numel()).view_as(y))]


def far(got, expected):
    return max((a.double() - b).norm().item() / max(b.norm().item(), 1e-30) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 48), (1, 5, 48), (3, 2, 48), (1, 48), (0, 48)])
def test_values_and_gradients_are_as_exact_as_torchs(bias, shape):
    plain, ours = layers(bias)
    x = torch.randn(shape)
    got, theirs = run(ours, x), run(plain, x)
    wide = nn.Linear(48, 33, bias=bias).double()
    wide.load_state_dict(plain.state_dict())
    y = wide(wide_x := x.double().requires_grad_())
    upstream = torch.linspace(-1, 1, y.numel()).view_as(y).double()
    expected = [y.detach(), *torch.autograd.grad(y, [wide_x, *wide.parameters()], upstream)]
    assert [a.shape for a in got] == [b.shape for b in theirs]
    assert far(got, expected) <= 2 * far(theirs, expected) + 1e-7


def test_strided_rows_and_what_is_frozen():
    plain, ours = layers(True)
    x = torch.randn(48, 9).t()
    torch.testing.assert_close(ours(x), plain(x))
    ours.weight.requires_grad_(False)
    ours(x).sum().backward()
    assert ours.weight.grad is None and ours.bias.grad.tolist() == [9.0] * 33


def test_other_dtypes_and_autocast_are_torchs():
    plain, ours = layers(True)
    x = torch.randn(5, 48)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
    assert torch.equal(ours.double()(x.double()), plain.double()(x.double()))


@pytest.mark.parametrize("load", [load_policy, load_token_model])
def test_a_loaded_model_multiplies_so(load, monkeypatch):
    shapes = []
    product = linear.product
    for module in (linear, gated):
        monkeypatch.setattr(module, "product", lambda a, b, bias=None: shapes.append(a.shape) or product(a, b, bias))
    model = load("scratch:demo", load_tokenizer("arithmetic"))
    shapes.clear()
    packed_hidden(model, pack([[3, 4, 5], [6, 7]], [1, 1])).sum().backward()
    assert len(shapes) == 3 * 3 * 7  # of every layer 7 products, with two gradients each
