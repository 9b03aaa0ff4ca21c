"""Ops that are not differentiable: their results are constants, and differentiating one raises."""

from collections.abc import Callable

import torch
from torch import Tensor

SERVED_BY_REFERENCE: set[str] = set()  # on every device, as their pages say
_LIBRARY = torch.library.Library("qrm_fast", "IMPL")


class ConstantOp:
    """A custom op without a derivative, called as `op(*args)`.

    custom_op's own way from the dispatcher to the kernel leads through Python for autograd's sake, 6 us a call and more
    than many a kernel takes. Here the dispatcher skips autograd, and the call looks for what requires a gradient. Who
    captures the op without this call, as torch.export does, gets a constant.
    """

    def __init__(self, op: torch.library.CustomOpDef) -> None:
        self.op = op
        self.reference = op._init_fn
        self.register_fake, self.register_kernel = op.register_fake, op.register_kernel
        self._overload = op._opoverload
        for key in ("AutogradCPU", "AutogradCUDA"):
            _LIBRARY.impl(op._name, torch.library.fallthrough_kernel, key)

    def __call__(self, *args):
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            # torch.compile takes no tensor twice, and what needs no gradient may be the same one
            args = (x.detach() if isinstance(x, Tensor) and not x.requires_grad else x for x in args)
            return _Undifferentiable.apply(self._overload, *args)
        return self._overload(*args)


def constant_op(name: str, *, on_every_device: bool = False) -> Callable[[Callable], ConstantOp]:
    """Make the decorated reference the default kernel of the op `qrm_fast::name`, which mutates nothing.

    `on_every_device`: it is the only one, on purpose. Without it a device that has no kernel of its own lacks one.
    """
    if on_every_device:
        SERVED_BY_REFERENCE.add(f"qrm_fast::{name}")
    return lambda reference: ConstantOp(torch.library.custom_op(f"qrm_fast::{name}", reference, mutates_args=()))


class _Undifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, *args):
        ctx.op = str(op)
        ctx.save_for_backward(*(x if needs else None for x, needs in zip(args, ctx.needs_input_grad[1:], strict=True)))
        return op(*args)

    @staticmethod
    def backward(ctx, *gradients):
        gradient = next(g for g in gradients if g is not None)
        return None, *(None if x is None else _refuse(gradient, x, ctx.op) for x in ctx.saved_tensors)


# An op, since torch.compile traces backwards before one is asked for; and one that reads the gradient, or it would be
# moved into the forward.
@torch.library.custom_op("qrm_fast_constant_op::refuse", mutates_args=())
def _refuse(gradient: Tensor, x: Tensor, op: str) -> Tensor:
    raise RuntimeError(f"{op} is not differentiable: detach its arguments or its results")


@_refuse.register_fake
def _(gradient, x, op):
    return torch.empty_like(x)
