"""Gated feed-forward layers that keep less of every row for their backward pass."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .linear import Linear, gradients, product

PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class Gated(nn.Module):
    """down(act(gate(x)) up(x)), which keeps gate(x) and up(x), two of the four rows that PyTorch keeps.

    The backward pass computes act(gate(x)) up(x) again. Results and gradients have the same bits.
    """

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        down = self.down_proj
        # an adapter in the place of a layer has products of its own
        if type(down) not in (nn.Linear, Linear) or not torch.is_grad_enabled() or torch.is_autocast_enabled():
            return super().forward(x)
        return _Down.apply(self.gate_proj(x), self.up_proj(x), down.weight, down.bias, self.act_fn)


def keep_less(model: nn.Module) -> None:
    """Make the layers of `model` that compute what `Gated` does, to the last bit, ones of that class."""
    for module in model.modules():
        if _is_gated(module):
            kind: Any = type(module)
            module.__class__ = _gated_kind(kind)


@torch.no_grad()
def _is_gated(module: Any) -> bool:
    linear = "gate_proj", "up_proj", "down_proj"
    if {name for name, _ in module.named_children()} != PARTS or isinstance(module, Gated):
        return False
    if not all(type(getattr(module, name)) in (nn.Linear, Linear) for name in linear):
        return False
    weight = module.gate_proj.weight
    x = torch.linspace(-2, 2, 2 * weight.shape[1], device=weight.device).view(2, -1).to(weight.dtype)
    return torch.equal(module(x), module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x)))


@cache
def _gated_kind(kind: Any) -> Any:
    return type(kind.__name__, (Gated, kind), {})


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, act: nn.Module) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        ctx.act = act
        return product(act(gate) * up, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        of_gate, of_up, of_weight, of_bias, _ = ctx.needs_input_grad
        with torch.enable_grad():
            factors = gate.detach().requires_grad_(), up.detach().requires_grad_()
            inside = ctx.act(factors[0]) * factors[1]
        wanted = of_gate or of_up, of_weight, of_bias
        of_inside, *of_down = gradients(grad, inside.detach(), weight, wanted)
        of_factors = (None, None) if of_inside is None else torch.autograd.grad(inside, factors, of_inside)
        return *of_factors, *of_down, None
