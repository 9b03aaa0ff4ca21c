"""The optimiser of every training here: AdamW in float32, clipped gradients, a learning rate set per step."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter


def adamw(parameters: Iterable[Parameter], *, betas: tuple[float, float] = (0.9, 0.999)) -> torch.optim.AdamW:
    """AdamW without weight decay; `step` sets the learning rate."""
    return torch.optim.AdamW(parameters, lr=0.0, betas=betas, weight_decay=0.0, fused=True)


def step(optimizer: torch.optim.Optimizer, lr: float, max_grad_norm: float) -> Tensor:
    """One update with gradients scaled down to `max_grad_norm` at most. Returns their norm before, 0-d."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm


def trapezoid(i: int, num_steps: int, *, warmup: int = 0, decay: float = 0.0) -> float:
    """Share of the peak learning rate at step i: up over `warmup` steps, down to 0 over the last share `decay`."""
    up = (i + 1) / (warmup + 1)
    down = (num_steps - i) / (decay * num_steps) if decay else 1.0
    return min(1.0, up, down)
