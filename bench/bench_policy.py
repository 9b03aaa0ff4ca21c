"""Losses of log-probabilities and values at hand: every row is read once, so they stand beside a copy."""

from collections.abc import Callable

import torch
from torch import Tensor

from qrm_fast import policy_loss, value_loss

from .harness import Case, case, copy

CLIP, KL_COEF, ENTROPY_COEF = 0.2, 0.05, 0.01
SHAPES = {"cpu": [{"num_tokens": 1 << 20}], "cuda": [{"num_tokens": 1 << 24}]}


def normal(device: torch.device, num_tokens: int, *scales: float) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [scale * torch.randn(num_tokens, generator=generator, device=device) for scale in scales]


def assert_as_exact(step: Callable, ours: Callable, plain: Callable, inputs: list[Tensor]) -> None:
    """Every result, the gradients last, is no further from float64 than that of `plain`, or than one rounding."""
    exact = step(plain, [x.double() for x in inputs])
    for got, peer, want in zip(step(ours, inputs), step(plain, inputs), exact, strict=True):
        far, allowed = ((x - want).norm() for x in (got, peer))
        assert far <= max(allowed, torch.finfo(got.dtype).eps * want.norm())


@case(**SHAPES)
def policy_loss_forward_backward(device: torch.device, num_tokens: int) -> Case:
    """Clipped PPO with k3 KL, entropy bonus and metrics; the gradients of log-probabilities and entropy."""
    logprobs, advantages, entropy, old, ref, weights = normal(device, num_tokens, 1, 1, 1, 0.2, 0.2, 1)
    logprobs, entropy, weights = -logprobs.abs(), entropy.abs(), weights.abs() / num_tokens
    tensors = [logprobs, entropy, advantages, logprobs + old, logprobs + ref, weights]

    def ours(logprobs, entropy, advantages, old, ref, weights) -> tuple[Tensor, ...]:
        result = policy_loss(
            logprobs, advantages, entropy=entropy, old_logprobs=old, ref_logprobs=ref, token_weights=weights,
            clip_low=CLIP, clip_high=CLIP, kl_coef=KL_COEF, entropy_coef=ENTROPY_COEF,
        )  # fmt: skip
        return result.loss, *result.metrics

    def by_terms(logprobs, entropy, advantages, old, ref, weights) -> tuple[Tensor, ...]:
        log_ratio, d = logprobs - old, logprobs - ref
        ratio, kl = log_ratio.exp(), torch.expm1(-d) + d
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        terms = torch.maximum(-advantages * ratio, -advantages * clipped) + KL_COEF * kl - ENTROPY_COEF * entropy
        with torch.no_grad():
            metrics = (
                ((ratio < 1 - CLIP) & (advantages < 0)) * weights,
                ((ratio > 1 + CLIP) & (advantages > 0)) * weights,
                (torch.expm1(log_ratio) - log_ratio) * weights,
                kl * weights,
                ratio * weights,
                entropy * weights,
            )
            sums = (*(x.sum() for x in metrics), ratio.max())
        return (terms * weights).sum(), *sums

    def step(loss_of: Callable, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs[:2]]
        loss, *metrics = loss_of(*leaves, *inputs[2:])
        return loss.detach(), *metrics, *torch.autograd.grad(loss, leaves)

    return sides(step, ours, by_terms, tensors, 8 * num_tokens)


@case(**SHAPES)
def value_loss_forward_backward(device: torch.device, num_tokens: int) -> Case:
    """Clipped, weighted squared error of a critic and its gradient."""
    values, errors, moves, weights = normal(device, num_tokens, 1, 1, 0.3, 1)
    tensors = [values, values + errors, values + moves, weights.abs() / num_tokens]

    def ours(values, returns, old, weights) -> Tensor:
        return value_loss(values, returns, old_values=old, clip=CLIP, token_weights=weights)

    def by_terms(values, returns, old, weights) -> Tensor:
        clipped = old + (values - old).clamp(-CLIP, CLIP)
        return (weights * torch.maximum((values - returns).square(), (clipped - returns).square())).sum()

    def step(loss_of: Callable, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        values = inputs[0].detach().requires_grad_()
        loss = loss_of(values, *inputs[1:])
        return loss.detach(), *torch.autograd.grad(loss, values)

    return sides(step, ours, by_terms, tensors, 4 * num_tokens)


def sides(step: Callable, ours: Callable, plain: Callable, tensors: list[Tensor], bytes_written: int) -> Case:
    """Ours beside plain PyTorch and its compilation."""
    fast = torch.compile(plain, dynamic=True)
    step(fast, [x[:8] for x in tensors])
    num_bytes = bytes_written + sum(x.nbytes for x in tensors)
    return Case(
        {
            "qrm_fast": lambda: step(ours, tensors),
            "autograd through PyTorch": lambda: step(plain, tensors),
            "torch.compile of that": lambda: step(fast, tensors),
        },
        gate=lambda: assert_as_exact(step, ours, plain, tensors),
        baseline=copy(num_bytes, tensors[0].device),
        bytes=num_bytes,
    )
