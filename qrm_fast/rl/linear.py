"""Linear layers of float32 models on a CPU through oneDNN."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Linear(nn.Linear):
    """`nn.Linear`, whose products of float32 matrices on a CPU, forward and backward, are oneDNN's.

    PyTorch gives them to MKL, which on AMD's processors takes about twice as long.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
            multiply = _Linear.apply if torch.is_grad_enabled() else product
            return multiply(x, self.weight, self.bias)
        return super().forward(x)


def use_onednn(model: nn.Module) -> None:
    """Make the linear layers of `model` ones of this file, where PyTorch was built with oneDNN."""
    if torch.backends.mkldnn.is_available():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = Linear


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return gradients(grad, x, weight, ctx.needs_input_grad)


def gradients(grad: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Of x, weight and bias, those that are `wanted`."""
    of_x, of_weight, of_bias = wanted
    rows, columns = grad.flatten(0, -2), x.flatten(0, -2)  # [R, N], [R, K]
    return (
        product(grad, weight.t()) if of_x else None,
        product(rows.t(), columns.t()) if of_weight else None,
        rows.sum(0) if of_bias else None,
    )


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b.T + bias: on a CPU what torch.compile makes of a linear layer, too."""
    small = not a.numel() or not b.numel()  # an expert without tokens, which oneDNN refuses
    if small or not a.is_cpu or a.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return F.linear(a, b, bias)
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
